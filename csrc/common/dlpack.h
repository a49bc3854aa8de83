// The part of DLPack 1.x that reading a tensor needs: https://dmlc.github.io/dlpack/latest/c_api.html
//
// A tensor library publishes a table of C functions as the attribute `__dlpack_c_exchange_api__` of its tensor
// type, a PyCapsule. The table's layout is fixed within a major version.
#pragma once

#include <cstdint>

namespace titok::dlpack {

constexpr char kCapsuleName[] = "dlpack_exchange_api";
constexpr uint32_t kMajorVersion = 1;

enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };

// DLTensor: a view of memory that the tensor owns.
struct Tensor {
  void* data;
  DeviceType device_type;
  int32_t device_id;
  int32_t ndim;
  TypeCode type_code;
  uint8_t type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

// DLPackExchangeAPI. `void*` stands for the functions that are not called here.
struct ExchangeApi {
  uint32_t major_version;
  uint32_t minor_version;
  void* previous_api;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  // Fills `out` without taking a reference; returns 0, or -1 with a Python exception set. May be null.
  int (*dltensor_from_py_object_no_sync)(void* py_object, Tensor* out);
  void* current_work_stream;
};

}  // namespace titok::dlpack
