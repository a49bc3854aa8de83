// How Python calls a C++ function: positional arguments that are read in order, each under its name.
#pragma once

#include "common/python_tensor.h"

namespace titok {

class Call {
 public:
  Call(PyObject* const* values, Py_ssize_t count) : values_(values), count_(count) {}

  // All tensors of a call lie on a device of this kind, those on GPUs on one GPU. CPU unless set.
  void expect_device(DeviceKind kind) { device_ = kind; }

  // Throw ArgumentError where the value is no tensor with readable memory on the device.
  TensorArg tensor(const char* name);
  TensorArg optional_tensor(const char* name);  // or None
  // Throw ArgumentError where the value is no integer, or not in [least, most].
  int64_t integer(const char* name, int64_t least, int64_t most);
  uint64_t unsigned_integer(const char* name);
  double number(const char* name);
  bool boolean(const char* name);
  Call tuple(const char* name, Py_ssize_t size);  // its items are the arguments of the result

  PyObject* object(const char* name);

 private:
  PyObject* const* values_;
  Py_ssize_t count_;
  Py_ssize_t next_ = 0;
  DeviceKind device_ = DeviceKind::kCpu;
  int32_t device_index_ = -1;  // of the first tensor
};

// Other Python threads run while one of these exists.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

// Turns the C++ exception that is being handled into a Python one; returns null.
PyObject* raise_in_python() noexcept;

namespace detail {
void expect_count(Py_ssize_t expected, Py_ssize_t actual);

template <PyObject* (*kFunction)(Call&), int kArguments>
PyObject* enter(PyObject*, PyObject* const* values, Py_ssize_t count) noexcept {
  try {
    expect_count(kArguments, count);
    Call call(values, count);
    return kFunction(call);
  } catch (...) {
    return raise_in_python();
  }
}
}  // namespace detail

// An entry of a module's table of functions. METH_FASTCALL: building a tuple and matching keywords would take
// longer than reading the tensors.
template <PyObject* (*kFunction)(Call&), int kArguments>
PyMethodDef python_function(const char* name, const char* doc) {
  const auto enter = &detail::enter<kFunction, kArguments>;
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(enter)), METH_FASTCALL, doc};
}

}  // namespace titok
