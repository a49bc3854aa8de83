// The Python module titok._C: the functions of each op (csrc/<op>/binding.cpp), and what the build and the machine offer.
#include "module.h"

#include "common/cpu_isa.h"

namespace titok {
namespace {

PyObject* cpu_isa(Call&) { return PyUnicode_FromString(cpu_isa_name()); }

PyObject* to_tuple(const int64_t* values, int count) {
  PyObject* const tuple = PyTuple_New(count);
  if (!tuple) throw PythonError{};
  for (int i = 0; i < count; ++i) PyTuple_SET_ITEM(tuple, i, PyLong_FromLongLong(values[i]));
  return tuple;
}

PyObject* describe_tensor(Call& call) {
  PyObject* const value = call.object("tensor");
  const bool attributes = call.boolean("attributes");
  const TensorArg tensor =
      read_tensor(value, "tensor", attributes ? TensorReader::kAttributes : TensorReader::kFastest);
  return Py_BuildValue("KssNN", reinterpret_cast<unsigned long long>(tensor.data), name_of(tensor.dtype),
                       device_of(tensor).c_str(), to_tuple(tensor.sizes, tensor.ndim),
                       to_tuple(tensor.strides, tensor.ndim));
}

PyMethodDef kFunctions[] = {
    python_function<cpu_isa, 0>("cpu_isa", "cpu_isa($module, /)\n--\n\n"
                                "Instruction set that the CPU kernels use here: generic, avx2 or avx512."),
    python_function<describe_tensor, 2>("_describe_tensor", "_describe_tensor($module, tensor, attributes, /)\n--\n\n"
                                        "(address, dtype, device, sizes, strides) as the kernels see a tensor. With "
                                        "`attributes`\nit is read the way that serves torch releases without the "
                                        "DLPack exchange API. For tests."),
    {}};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT,
                       "_C",
                       "Compiled kernels of titok. Import torch first: both share one OpenMP runtime.",
                       -1,
                       kFunctions,
                       nullptr,
                       nullptr,
                       nullptr,
                       nullptr};

#if defined(TITOK_WITH_CUDA)
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

}  // namespace
}  // namespace titok

PyMODINIT_FUNC PyInit__C() {
  using namespace titok;
  PyObject* const module = PyModule_Create(&kModule);
  if (!module) return nullptr;
  PyObject* const with_cuda = PyBool_FromLong(kWithCuda);
  const bool failed = PyModule_AddObjectRef(module, "with_cuda", with_cuda) || bind_add_layer_norm(module) ||
                      bind_group_norm_silu(module) || bind_masked_attention(module) || bind_maskgit_decode(module) ||
                      bind_nearest_codebook(module);
  Py_DECREF(with_cuda);
  if (!failed) return module;
  Py_DECREF(module);
  return nullptr;
}
