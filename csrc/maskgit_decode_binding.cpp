// Python bindings of the MaskGIT decode step. Tensors arrive as addresses, checked by titok/ops/maskgit_decode_step.py.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "maskgit_decode.h"
#include "module.h"

namespace py = pybind11;

namespace titok {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// In the order of DecodeParams.
using Params = std::tuple<uint64_t, uint64_t, uint32_t, int32_t, float, float, float, float>;

// Addresses may be 0 where the argument is optional. Strides and row counts are those of (cond, uncond).
DecodeArgs pack(uintptr_t tokens, std::pair<uintptr_t, uintptr_t> logits, std::pair<uintptr_t, uintptr_t> rows,
                std::tuple<int64_t, int64_t, int64_t, int64_t> strides, std::pair<int64_t, int64_t> row_counts,
                uintptr_t keep, uintptr_t params_at, std::tuple<int32_t, int32_t, int32_t> shape, int type,
                int64_t mask_token, bool maskgit, uintptr_t out, uintptr_t confidence, Params params) {
  DecodeArgs args{};
  args.tokens = pointer<const int64_t>(tokens);
  args.cond = pointer<const void>(logits.first);
  args.uncond = pointer<const void>(logits.second);
  args.rows = pointer<const int64_t>(rows.first);
  args.uncond_rows = pointer<const int64_t>(rows.second);
  args.keep = pointer<const int64_t>(keep);
  args.params_at = pointer<const DecodeParams>(params_at);
  std::tie(args.cond_stride_b, args.cond_stride_n, args.uncond_stride_b, args.uncond_stride_n) = strides;
  std::tie(args.cond_rows_count, args.uncond_rows_count) = row_counts;
  std::tie(args.batch, args.length, args.codes) = shape;
  args.type = static_cast<LogitType>(type);
  args.mask_token = mask_token;
  args.maskgit = maskgit;
  args.out = pointer<int64_t>(out);
  args.confidence = pointer<float>(confidence);
  DecodeParams& p = args.params;
  std::tie(p.seed, p.first_sample, p.step, p.num_masked, p.guidance, p.inverse_temperature, p.noise, p.draw_scale) =
      params;
  return args;
}

}  // namespace

void bind_maskgit_decode(py::module_& m) {
  py::class_<DecodeArgs>(m, "DecodeArgs")
      .def(py::init(&pack), py::arg("tokens"), py::arg("logits"), py::arg("rows"), py::arg("strides"),
           py::arg("row_counts"), py::arg("keep"), py::arg("params_at"), py::arg("shape"), py::arg("type"),
           py::arg("mask_token"), py::arg("maskgit"), py::arg("out"), py::arg("confidence"), py::arg("params"));
  m.def(
      "maskgit_decode_cpu", [](const DecodeArgs& args, int threads) { return int(maskgit_decode_cpu(args, threads)); },
      py::call_guard<py::gil_scoped_release>(), "Runs the step; returns 0, or which input holds a bad value.");
#if defined(TITOK_WITH_CUDA)
  m.def("maskgit_decode_cuda", [](DecodeArgs args, uintptr_t drawn, uintptr_t arrivals, uintptr_t stream) {
    args.drawn = pointer<int32_t>(drawn);
    args.arrivals = pointer<uint32_t>(arrivals);
    if (const char* error = maskgit_decode_cuda(args, pointer<void>(stream))) {
      throw std::runtime_error(std::string("maskgit_decode_step: CUDA error: ") + error);
    }
  });
#endif
}

}  // namespace titok
