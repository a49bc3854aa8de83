// The checks of tensors and the wording of their messages.
#include "common/tensor.h"

namespace titok {
namespace {

std::string join(const int64_t* values, int count) {
  std::string text = "(";
  for (int i = 0; i < count; ++i) {
    if (i > 0) text += ", ";
    text += values[i] == kAnySize ? "*" : std::to_string(values[i]);
  }
  return text + (count == 1 ? ",)" : ")");
}

// Whether the dimensions, listed from the innermost to the outermost, lie in memory without gaps.
bool is_dense(const TensorArg& tensor, const int* dims, int count) {
  if (tensor.numel() == 0) return true;
  int64_t expected = 1;
  for (int i = 0; i < count; ++i) {
    const int64_t size = tensor.sizes[dims[i]];
    if (size != 1 && tensor.strides[dims[i]] != expected) return false;
    expected *= size;
  }
  return true;
}

std::string strides_of(const TensorArg& tensor) {
  return "shape " + shape_of(tensor) + " with strides " + join(tensor.strides, tensor.ndim);
}

}  // namespace

int64_t TensorArg::product(int first, int last) const {
  int64_t result = 1;
  bool overflows = false;
  for (int i = first; i < last; ++i) {
    if (sizes[i] == 0) return 0;
    overflows |= __builtin_mul_overflow(result, sizes[i], &result);
  }
  return overflows ? INT64_MAX : result;
}

void raise_value_error(const char* name, const std::string& expected, const std::string& actual) {
  throw ArgumentError{false, std::string(name) + ": expected " + expected + ", got " + actual};
}

void raise_type_error(const char* name, const std::string& expected, const std::string& actual) {
  throw ArgumentError{true, std::string(name) + ": expected " + expected + ", got " + actual};
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat16: return "float16";
    case DType::kFloat64: return "float64";
    case DType::kInt64: return "int64";
    case DType::kInt32: return "int32";
    case DType::kInt16: return "int16";
    case DType::kInt8: return "int8";
    case DType::kUInt8: return "uint8";
    case DType::kBool: return "bool";
    case DType::kComplex64: return "complex64";
    case DType::kComplex128: return "complex128";
    case DType::kOther: break;
  }
  return "another dtype";
}

std::string shape_of(const TensorArg& tensor) { return join(tensor.sizes, tensor.ndim); }

std::string device_of(const TensorArg& tensor) {
  switch (tensor.device) {
    case DeviceKind::kCpu: return "cpu";
    case DeviceKind::kCuda: return "cuda:" + std::to_string(tensor.device_index);
    case DeviceKind::kOther: break;
  }
  return "another device";
}

void expect_dtype(const TensorArg& tensor, std::initializer_list<DType> dtypes) {
  std::string wanted;
  for (const DType dtype : dtypes) {
    if (tensor.dtype == dtype) return;
  }
  for (const DType dtype : dtypes) wanted += std::string(wanted.empty() ? "" : " or ") + name_of(dtype);
  raise_type_error(tensor.name, "dtype " + wanted, name_of(tensor.dtype));
}

void expect_shape(const TensorArg& tensor, std::initializer_list<int64_t> sizes) {
  const int count = static_cast<int>(sizes.size());
  bool fits = tensor.ndim == count;
  for (int i = 0; fits && i < count; ++i)
    fits = sizes.begin()[i] == kAnySize || sizes.begin()[i] == tensor.sizes[i];
  if (!fits) raise_value_error(tensor.name, "shape " + join(sizes.begin(), count), shape_of(tensor));
}

void expect_shape_of(const TensorArg& tensor, const TensorArg& like) {
  bool fits = tensor.ndim == like.ndim;
  for (int i = 0; fits && i < like.ndim; ++i) fits = tensor.sizes[i] == like.sizes[i];
  if (!fits)
    raise_value_error(tensor.name, "the shape of " + std::string(like.name) + ", " + shape_of(like),
                      shape_of(tensor));
}

void expect_contiguous(const TensorArg& tensor) {
  int dims[TensorArg::kMaxDims];
  for (int i = 0; i < tensor.ndim; ++i) dims[i] = tensor.ndim - 1 - i;
  if (!is_dense(tensor, dims, tensor.ndim))
    raise_value_error(tensor.name, "a contiguous tensor", strides_of(tensor));
}

void expect_contiguous(const TensorArg& tensor, std::initializer_list<DType> dtypes,
                       std::initializer_list<int64_t> sizes) {
  expect_dtype(tensor, dtypes);
  expect_shape(tensor, sizes);
  expect_contiguous(tensor);
}

void expect_channels_last(const TensorArg& tensor) {
  expect_shape(tensor, {kAnySize, kAnySize, kAnySize, kAnySize});
  const int dims[] = {1, 3, 2, 0};
  if (!is_dense(tensor, dims, 4))
    raise_value_error(tensor.name, "a contiguous channels-last map", strides_of(tensor));
}

void expect_dense_last_dimension(const TensorArg& tensor) {
  if (tensor.numel() > 0 && tensor.size(-1) > 1 && tensor.stride(-1) != 1) {
    raise_value_error(tensor.name, "stride 1 in the last dimension", strides_of(tensor));
  }
}

void expect_given(const TensorArg& tensor, bool given, const char* condition) {
  if (tensor.given == given) return;
  raise_value_error(tensor.name, std::string(given ? "a tensor " : "None ") + condition,
                    tensor.given ? "a tensor" : "None");
}

}  // namespace titok
