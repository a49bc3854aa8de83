// A tensor that an op was given, and the checks that every op makes before it touches the memory.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "common/dtype.h"

namespace titok {

enum class DeviceKind : int32_t { kCpu, kCuda, kOther };

struct TensorArg {
  static constexpr int kMaxDims = 64;  // as many as PyTorch's own loops over elements take

  const char* name;  // name of the argument, for messages
  bool given;        // false for None; then nothing below holds
  void* data;        // first element; null only if there is no element
  DType dtype;
  DeviceKind device;
  int32_t device_index;
  int32_t ndim;
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxDims];  // in elements

  // Size of a dimension; negative ones count from the last.
  int64_t size(int dim) const { return sizes[dim < 0 ? ndim + dim : dim]; }
  int64_t stride(int dim) const { return strides[dim < 0 ? ndim + dim : dim]; }
  // The product of the sizes in [first, last), or INT64_MAX where it is larger.
  int64_t product(int first, int last) const;
  int64_t numel() const { return product(0, ndim); }

  template <class T>
  T* as() const {
    return given ? static_cast<T*>(data) : nullptr;
  }
};

// A bad argument: Python raises TypeError for a wrong type or dtype, else ValueError.
struct ArgumentError {
  bool wrong_type;
  std::string message;
};

// Throw ArgumentError with the message "<name>: expected <expected>, got <actual>".
[[noreturn]] void raise_value_error(const char* name, const std::string& expected, const std::string& actual);
[[noreturn]] void raise_type_error(const char* name, const std::string& expected, const std::string& actual);

const char* name_of(DType dtype);
std::string shape_of(const TensorArg& tensor);
std::string device_of(const TensorArg& tensor);

// In an expected shape, a size that may be anything.
constexpr int64_t kAnySize = -1;

// Each of these throws ArgumentError unless the tensor is as its name says.
void expect_dtype(const TensorArg& tensor, std::initializer_list<DType> dtypes);
void expect_shape(const TensorArg& tensor, std::initializer_list<int64_t> sizes);
void expect_shape_of(const TensorArg& tensor, const TensorArg& like);
// Row-major without gaps; strides of dimensions of size 1 do not matter.
void expect_contiguous(const TensorArg& tensor);
// Contiguous, of one of these dtypes and of this shape.
void expect_contiguous(const TensorArg& tensor, std::initializer_list<DType> dtypes,
                       std::initializer_list<int64_t> sizes);
// (batch, channels, height, width) whose memory is (batch, height, width, channels) without gaps.
void expect_channels_last(const TensorArg& tensor);
// Neighbours of the last dimension are neighbours in memory.
void expect_dense_last_dimension(const TensorArg& tensor);
// Given, or None. `condition` says in the message why.
void expect_given(const TensorArg& tensor, bool given, const char* condition);

}  // namespace titok
