// The library that OpenVINO loads: Taut's kernels as operations of the ONNX domain `taut`.
//
//     core.add_extension("libtaut_openvino.so");
//     auto model = core.read_model("net.onnx");   // or the .xml that was saved of it
#include "openvino/core/extension.hpp"
#include "openvino/core/op_extension.hpp"
#include "openvino/frontend/onnx/extension/op.hpp"

#include "openvino/bitplane.h"
#include "openvino/decoded.h"
#include "openvino/sparse.h"

namespace {

using Extensions = std::vector<ov::Extension::Ptr>;

// In OpenVINO's own files, and in ONNX.
template <class... Ops>
Extensions extensions_of() {
  Extensions all;
  (all.insert(all.end(),
              {std::make_shared<ov::OpExtension<Ops>>(),
               std::make_shared<ov::frontend::onnx::OpExtension<Ops>>(
                   Ops::get_type_info_static().name, "taut")}),
   ...);
  return all;
}

}  // namespace

OPENVINO_CREATE_EXTENSIONS(
    (extensions_of<taut::BitplaneMatmulOp, taut::BitplaneConv2dOp, taut::LookupMatmulOp,
                   taut::LookupMatmulInt8Op, taut::HashedMatmulOp, taut::SparseMatmulOp,
                   taut::SparseConv2dOp>()));
