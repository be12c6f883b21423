// Runs every TAUT_TEST of this folder, or those whose names hold the argument.
#include "check.h"

int main(int count, char** arguments) {
  const std::string wanted = count > 1 ? arguments[1] : "";
  for (const auto& test : check::tests()) {
    if (std::string(test.name).find(wanted) == std::string::npos) continue;
    const int before = check::failures();
    test.run();
    std::printf("%s  %s\n", check::failures() == before ? "ok    " : "FAILED", test.name);
    std::fflush(stdout);
  }
  return check::failures() != 0;
}
