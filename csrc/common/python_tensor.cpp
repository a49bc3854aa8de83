#include "common/python_tensor.h"

#include "common/dlpack.h"

namespace titok {
namespace {

// Owns a reference.
class Ref {
 public:
  explicit Ref(PyObject* object) : object_(object) {}
  Ref(Ref&& other) : object_(other.release()) {}
  ~Ref() { Py_XDECREF(object_); }
  Ref& operator=(const Ref&) = delete;
  PyObject* get() const { return object_; }
  PyObject* release() {
    PyObject* const object = object_;
    object_ = nullptr;
    return object;
  }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_;
};

struct NamedDType {
  DType dtype;
  dlpack::TypeCode code;
  uint8_t bits;
};
constexpr NamedDType kDTypes[] = {
    {DType::kFloat32, dlpack::kFloat, 32},     {DType::kBFloat16, dlpack::kBfloat, 16},
    {DType::kFloat16, dlpack::kFloat, 16},     {DType::kFloat64, dlpack::kFloat, 64},
    {DType::kInt64, dlpack::kInt, 64},         {DType::kInt32, dlpack::kInt, 32},
    {DType::kInt16, dlpack::kInt, 16},         {DType::kInt8, dlpack::kInt, 8},
    {DType::kUInt8, dlpack::kUInt, 8},         {DType::kBool, dlpack::kBool, 8},
    {DType::kComplex64, dlpack::kComplex, 64}, {DType::kComplex128, dlpack::kComplex, 128},
};
constexpr int kNamedDTypes = sizeof(kDTypes) / sizeof(kDTypes[0]);

// Bytes of an element; 1 for a type that has no name here.
uintptr_t element_bytes(DType dtype) {
  for (const NamedDType& known : kDTypes) {
    if (known.dtype == dtype) return known.bits / 8;
  }
  return 1;
}

// What is looked up in torch once. The references are kept until the process ends.
struct Torch {
  PyTypeObject* tensor;
  PyTypeObject* parameter;
  PyObject* without_torch_function;  // calls a function while __torch_function__ of subclasses is off
  // Methods and getters of torch.Tensor, which take the tensor as their argument.
  PyObject* is_neg;
  PyObject* data_ptr;
  PyObject* size;
  PyObject* stride;
  PyObject* dtype;
  PyObject* is_cpu;
  PyObject* is_cuda;
  PyObject* device;
  PyObject* dtypes[kNamedDTypes];       // torch.float32 ..., in the order of kDTypes
  const dlpack::ExchangeApi* exchange;  // null where this torch has none
};

PyObject* attribute(PyObject* object, const char* name) {
  PyObject* const value = object ? PyObject_GetAttrString(object, name) : nullptr;
  if (!value) throw PythonError{};
  return value;
}

const dlpack::ExchangeApi* find_exchange(PyObject* tensor_type) {
  const Ref capsule(PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__"));
  if (!capsule || !PyCapsule_IsValid(capsule.get(), dlpack::kCapsuleName)) {
    PyErr_Clear();
    return nullptr;
  }
  const auto* const api =
      static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.get(), dlpack::kCapsuleName));
  return api->major_version == dlpack::kMajorVersion && api->dltensor_from_py_object_no_sync ? api : nullptr;
}

// Null where torch is not imported: then no object can be a tensor. The GIL guards the first call.
const Torch* find_torch() {
  static Torch found;
  static bool ready = false;
  if (ready) return &found;
  const Ref name(PyUnicode_FromString("torch"));
  const Ref torch(PyImport_GetModule(name.get()));
  if (!torch && PyErr_Occurred()) throw PythonError{};
  if (!torch || torch.get() == Py_None) return nullptr;
  const Ref internals(attribute(torch.get(), "_C")), nn(attribute(torch.get(), "nn"));
  const Ref base(attribute(internals.get(), "TensorBase"));
  const auto getter = [&](const char* name) {
    const Ref descriptor(attribute(base.get(), name));
    return attribute(descriptor.get(), "__get__");
  };
  PyObject* const tensor = attribute(torch.get(), "Tensor");
  PyObject* const parameter = attribute(nn.get(), "Parameter");
  found.tensor = reinterpret_cast<PyTypeObject*>(tensor);
  found.parameter = reinterpret_cast<PyTypeObject*>(parameter);
  found.without_torch_function = attribute(internals.get(), "_disabled_torch_function_impl");
  found.is_neg = attribute(base.get(), "is_neg");
  found.data_ptr = attribute(base.get(), "data_ptr");
  found.size = attribute(base.get(), "size");
  found.stride = attribute(base.get(), "stride");
  found.dtype = getter("dtype");
  found.is_cpu = getter("is_cpu");
  found.is_cuda = getter("is_cuda");
  found.device = getter("device");
  for (int i = 0; i < kNamedDTypes; ++i) found.dtypes[i] = attribute(torch.get(), name_of(kDTypes[i].dtype));
  found.exchange = find_exchange(tensor);
  ready = true;
  return &found;
}

// The text of the exception that is set, which it clears: its first line, without the notes that torch adds below.
std::string take_error() {
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  const Ref owned[] = {Ref(type), Ref(value), Ref(traceback)};
  const Ref text(value ? PyObject_Str(value) : nullptr);
  const char* const utf8 = text ? PyUnicode_AsUTF8(text.get()) : nullptr;
  std::string line = utf8 ? utf8 : "unknown error";
  PyErr_Clear();
  return line.substr(0, line.find('\n'));
}

[[noreturn]] void raise_unreadable(const char* name) {
  raise_value_error(name, "a strided tensor whose elements lie in memory",
                    "one that cannot be read (" + take_error() + ")");
}

// Calls a method or getter of torch.Tensor without running Python code of a subclass.
Ref ask(const Torch& torch, PyObject* method, PyObject* tensor, const char* name) {
  PyObject* result;
  if (Py_TYPE(tensor) == torch.tensor || Py_TYPE(tensor) == torch.parameter) {
    result = PyObject_CallOneArg(method, tensor);
  } else {
    result = PyObject_CallFunction(torch.without_torch_function, "O()(O)", method, tensor);
  }
  if (!result) raise_unreadable(name);
  return Ref(result);
}

void read_exchanged(const Torch& torch, PyObject* value, TensorArg& to) {
  dlpack::Tensor from;
  if (torch.exchange->dltensor_from_py_object_no_sync(value, &from) != 0) raise_unreadable(to.name);
  to.data = from.data ? static_cast<char*>(from.data) + from.byte_offset : nullptr;
  to.dtype = DType::kOther;
  for (const NamedDType& known : kDTypes) {
    if (from.type_code == known.code && from.type_bits == known.bits && from.type_lanes == 1)
      to.dtype = known.dtype;
  }
  to.device = from.device_type == dlpack::kCpu    ? DeviceKind::kCpu
              : from.device_type == dlpack::kCuda ? DeviceKind::kCuda
                                                  : DeviceKind::kOther;
  to.device_index = from.device_id;
  to.ndim = from.ndim;
  for (int i = 0; i < from.ndim && i < TensorArg::kMaxDims; ++i) {
    to.sizes[i] = from.shape[i];
    to.strides[i] = from.strides[i];
  }
}

int64_t integer_of(PyObject* value, const char* name) {
  const int64_t result = PyLong_AsLongLong(value);
  if (result == -1 && PyErr_Occurred()) raise_unreadable(name);
  return result;
}

void read_attributes(const Torch& torch, PyObject* value, TensorArg& to) {
  const Ref data = ask(torch, torch.data_ptr, value, to.name);
  to.data = PyLong_AsVoidPtr(data.get());
  if (PyErr_Occurred()) raise_unreadable(to.name);
  const Ref dtype = ask(torch, torch.dtype, value, to.name);
  to.dtype = DType::kOther;
  for (int i = 0; i < kNamedDTypes; ++i) {
    if (dtype.get() == torch.dtypes[i]) to.dtype = kDTypes[i].dtype;
  }
  to.device = DeviceKind::kCpu;
  to.device_index = 0;
  if (ask(torch, torch.is_cpu, value, to.name).get() != Py_True) {
    const bool cuda = ask(torch, torch.is_cuda, value, to.name).get() == Py_True;
    to.device = cuda ? DeviceKind::kCuda : DeviceKind::kOther;
    const Ref device = ask(torch, torch.device, value, to.name);
    const Ref index(attribute(device.get(), "index"));
    if (index.get() != Py_None) to.device_index = static_cast<int32_t>(integer_of(index.get(), to.name));
  }
  const Ref sizes = ask(torch, torch.size, value, to.name), strides = ask(torch, torch.stride, value, to.name);
  if (!PyTuple_Check(sizes.get()) || !PyTuple_Check(strides.get())) raise_unreadable(to.name);
  to.ndim = static_cast<int32_t>(PyTuple_GET_SIZE(sizes.get()));
  for (int i = 0; i < to.ndim && i < TensorArg::kMaxDims; ++i) {
    to.sizes[i] = integer_of(PyTuple_GET_ITEM(sizes.get(), i), to.name);
    to.strides[i] = integer_of(PyTuple_GET_ITEM(strides.get(), i), to.name);
  }
}

}  // namespace

TensorArg read_tensor(PyObject* value, const char* name, TensorReader reader) {
  const Torch* const torch = find_torch();
  if (!torch || !PyObject_TypeCheck(value, torch->tensor)) {
    raise_type_error(name, "a torch.Tensor", Py_TYPE(value)->tp_name);
  }
  TensorArg tensor;
  tensor.name = name;
  tensor.given = true;
  if (torch->exchange && reader == TensorReader::kFastest) {
    read_exchanged(*torch, value, tensor);
  } else {
    read_attributes(*torch, value, tensor);
  }
  if (tensor.ndim > TensorArg::kMaxDims) {
    raise_value_error(name, "at most " + std::to_string(TensorArg::kMaxDims) + " dimensions",
                      std::to_string(tensor.ndim));
  }
  if (!tensor.data && tensor.numel() > 0) {
    raise_value_error(name, "a strided tensor whose elements lie in memory", "one without storage");
  }
  const uintptr_t bytes = element_bytes(tensor.dtype), misplaced = reinterpret_cast<uintptr_t>(tensor.data) % bytes;
  if (misplaced != 0 && tensor.numel() > 0) {
    raise_value_error(name, "an address that is a multiple of the " + std::to_string(bytes) + " bytes of an element",
                      "one that is " + std::to_string(misplaced) + " bytes above a multiple");
  }
  if (ask(*torch, torch->is_neg, value, name).get() == Py_True) {
    raise_value_error(name, "values as they lie in memory", "a negated view (see torch.Tensor.resolve_neg)");
  }
  return tensor;
}

}  // namespace titok
