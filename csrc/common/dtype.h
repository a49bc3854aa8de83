// Element types of tensors, and the storage types of those that C++ lacks.
#pragma once

#include <cstdint>

namespace titok {

enum class DType : int32_t {
  kFloat32,
  kBFloat16,
  kFloat16,
  kFloat64,
  kInt64,
  kInt32,
  kInt16,
  kInt8,
  kUInt8,
  kBool,
  kComplex64,
  kComplex128,
  kOther,  // a type that has no name here; no kernel takes it
};

// The bits of a 16-bit float. Types without functions, so that code for different instruction sets can share them.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Bytes of an element of the types that kernels compute with.
constexpr int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace titok
