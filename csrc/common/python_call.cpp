#include "common/python_call.h"

#include <exception>
#include <new>
#include <stdexcept>

namespace titok {
namespace {

std::string text_of(PyObject* value) {
  PyObject* const text = PyObject_Repr(value);
  const char* const utf8 = text ? PyUnicode_AsUTF8(text) : nullptr;
  std::string result = utf8 ? utf8 : Py_TYPE(value)->tp_name;
  PyErr_Clear();
  Py_XDECREF(text);
  return result;
}

// Whether the value is no bool and converting it to a number runs no Python code, which could change the tensors
// that were read before. NumPy's scalars are of static types; a type that is written in Python is not.
bool may_be_converted(PyObject* value) {
  if (PyBool_Check(value)) return false;
  return PyLong_Check(value) || PyFloat_Check(value) || !PyType_HasFeature(Py_TYPE(value), Py_TPFLAGS_HEAPTYPE);
}

// A new reference to the value as an int. Throws ArgumentError where it is none.
PyObject* as_integer(PyObject* value, const char* name) {
  PyObject* const integer = may_be_converted(value) ? PyNumber_Index(value) : nullptr;
  if (integer) return integer;
  PyErr_Clear();
  raise_type_error(name, "an integer", Py_TYPE(value)->tp_name);
}

}  // namespace

PyObject* Call::object(const char* name) {
  if (next_ == count_) raise_type_error(name, "an argument", "none");
  return values_[next_++];
}

TensorArg Call::tensor(const char* name) {
  const TensorArg tensor = read_tensor(object(name), name);
  if (device_index_ < 0) device_index_ = tensor.device_index;
  if (tensor.device != device_ || tensor.device_index != device_index_) {
    const bool cpu = device_ == DeviceKind::kCpu;
    raise_value_error(name, "device " + (cpu ? "cpu" : "cuda:" + std::to_string(device_index_)),
                      device_of(tensor));
  }
  return tensor;
}

TensorArg Call::optional_tensor(const char* name) {
  if (next_ < count_ && values_[next_] == Py_None) {
    ++next_;
    TensorArg none;
    none.name = name;
    none.given = false;
    none.data = nullptr;
    return none;
  }
  return tensor(name);
}

int64_t Call::integer(const char* name, int64_t least, int64_t most) {
  PyObject* const value = object(name);
  PyObject* const integer = as_integer(value, name);
  int overflow = 0;
  const int64_t result = PyLong_AsLongLongAndOverflow(integer, &overflow);
  Py_DECREF(integer);
  if (overflow || result < least || result > most) {
    raise_value_error(name, "an integer in [" + std::to_string(least) + ", " + std::to_string(most) + "]",
                      text_of(value));
  }
  return result;
}

uint64_t Call::unsigned_integer(const char* name) {
  PyObject* const value = object(name);
  PyObject* const integer = as_integer(value, name);
  const uint64_t result = PyLong_AsUnsignedLongLong(integer);
  Py_DECREF(integer);
  if (PyErr_Occurred()) {
    PyErr_Clear();
    raise_value_error(name, "an integer in [0, 2^64)", text_of(value));
  }
  return result;
}

double Call::number(const char* name) {
  PyObject* const value = object(name);
  const bool convertible = may_be_converted(value);
  const double result = convertible ? PyFloat_AsDouble(value) : 0;
  if (convertible && !PyErr_Occurred()) return result;
  PyErr_Clear();
  raise_type_error(name, "a number", Py_TYPE(value)->tp_name);
}

bool Call::boolean(const char* name) {
  PyObject* const value = object(name);
  if (!PyBool_Check(value)) raise_type_error(name, "a bool", Py_TYPE(value)->tp_name);
  return value == Py_True;
}

Call Call::tuple(const char* name, Py_ssize_t size) {
  PyObject* const value = object(name);
  if (!PyTuple_Check(value)) raise_type_error(name, "a tuple", Py_TYPE(value)->tp_name);
  if (PyTuple_GET_SIZE(value) != size) {
    raise_value_error(name, std::to_string(size) + " items", std::to_string(PyTuple_GET_SIZE(value)));
  }
  return Call(&PyTuple_GET_ITEM(value, 0), size);
}

PyObject* raise_in_python() noexcept {
  try {
    throw;
  } catch (const ArgumentError& error) {
    PyErr_SetString(error.wrong_type ? PyExc_TypeError : PyExc_ValueError, error.message.c_str());
  } catch (const PythonError&) {
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

namespace detail {
void expect_count(Py_ssize_t expected, Py_ssize_t actual) {
  if (actual == expected) return;
  throw ArgumentError{
      true, "expected " + std::to_string(expected) + " positional arguments, got " + std::to_string(actual)};
}
}  // namespace detail

}  // namespace titok
