// What the machine and this build have, for doctor and the tests.
#include <torch/headeronly/version.h>

#include "binding/check.h"
#include "scratch.h"

std::vector<taut::Operation>& taut::operations() {
  static std::vector<Operation> all;
  return all;
}

namespace {

std::string operations() {
  std::string all;
  for (const auto& op : taut::operations()) all += std::string(all.empty() ? "" : " ") + op.name;
  return all;
}

// The variants of an operation that processors with these flags can run, the chosen one first.
std::string variants(std::string op, int64_t flags) {
  for (const auto& each : taut::operations()) {
    if (op == each.name) return each.variants(flags);
  }
  STD_TORCH_CHECK(false, "no operation is called ", op, "; there are ", operations());
}

// What compiled this library, and the PyTorch whose headers it read.
std::string build() {
#if defined(__clang__)
  return "clang " __clang_version__ ", PyTorch " TORCH_VERSION;
#else
  return "g++ " __VERSION__ ", PyTorch " TORCH_VERSION;
#endif
}

int64_t machine_flags() { return taut::machine_flags(); }

double clock_ghz() { return taut::clock_ghz(); }

int64_t scratch_bytes() { return taut::scratch_bytes(); }

void restrict_flags(int64_t allowed) { taut::restrict_flags(uint32_t(allowed)); }

}  // namespace

STABLE_TORCH_LIBRARY(taut, m) {
  m.def("operations() -> str");
  m.def("variants(str op, int flags) -> str");
  m.def("build() -> str");
  m.def("machine_flags() -> int");
  m.def("clock_ghz() -> float");
  m.def("scratch_bytes() -> int");
  m.def("restrict_flags(int allowed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(taut, CompositeExplicitAutograd, m) {
  m.impl("operations", TORCH_BOX(&operations));
  m.impl("variants", TORCH_BOX(&variants));
  m.impl("build", TORCH_BOX(&build));
  m.impl("machine_flags", TORCH_BOX(&machine_flags));
  m.impl("clock_ghz", TORCH_BOX(&clock_ghz));
  m.impl("scratch_bytes", TORCH_BOX(&scratch_bytes));
  m.impl("restrict_flags", TORCH_BOX(&restrict_flags));
}
