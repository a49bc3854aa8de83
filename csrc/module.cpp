// The Python module titok._C: the functions of each op (csrc/<op>/binding.cpp), and what the build and the machine
// offer.
//
// pybind11 makes the module and the functions whose calls are rare. The functions of the ops are called many times
// for each image and take many tensors; common/python_call.h reads these for a fraction of what pybind11's casters
// cost.
#include "module.h"

#include <pybind11/pybind11.h>

#include "common/cpu_isa.h"

namespace py = pybind11;

namespace titok {
namespace {

py::tuple to_tuple(const int64_t* values, int count) {
  py::tuple tuple(count);
  for (int i = 0; i < count; ++i) tuple[i] = py::int_(values[i]);
  return tuple;
}

py::tuple describe_tensor(const py::object& value, bool attributes) {
  try {
    const TensorArg tensor =
        read_tensor(value.ptr(), "tensor", attributes ? TensorReader::kAttributes : TensorReader::kFastest);
    return py::make_tuple(reinterpret_cast<uintptr_t>(tensor.data), name_of(tensor.dtype), device_of(tensor),
                          to_tuple(tensor.sizes, tensor.ndim), to_tuple(tensor.strides, tensor.ndim));
  } catch (...) {
    raise_in_python();
    throw py::error_already_set();
  }
}

#if defined(TITOK_WITH_CUDA)
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

}  // namespace
}  // namespace titok

PYBIND11_MODULE(_C, m) {
  using namespace titok;
  m.doc() = "Compiled kernels of titok. Import torch first: both share one OpenMP runtime.";
  m.attr("with_cuda") = kWithCuda;
  m.def("cpu_isa", &cpu_isa_name, "Instruction set that the CPU kernels use here: generic, avx2 or avx512.");
  m.def(
      "_describe_tensor", &describe_tensor, py::arg("tensor"), py::arg("attributes"),
      "(address, dtype, device, sizes, strides) as the kernels see a tensor. With `attributes` it is read the way "
      "that serves torch releases without the DLPack exchange API. For tests.");
  m.def("multiplies_int8", &cpu_multiplies_int8, "Whether the CPU has the instructions that int8_linear is fast with.");
  for (const auto bind : {bind_add_layer_norm, bind_group_norm_silu, bind_int8_linear, bind_masked_attention,
                          bind_masked_decode, bind_maskgit_decode, bind_nearest_codebook}) {
    if (bind(m.ptr()) != 0) throw py::error_already_set();
  }
}
