// Reads a torch.Tensor without a header or symbol of PyTorch, so that one binary serves every torch release.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "common/tensor.h"

namespace titok {

// The interpreter already holds the exception that is to be raised.
struct PythonError {};

enum class TensorReader {
  kFastest,     // the exchange API where this torch has one, else attributes
  kAttributes,  // what every torch has
};

// Throws ArgumentError where the value is no torch.Tensor, or one whose elements do not lie in memory as they are:
// without storage (meta, fake, functorch's wrappers), not strided (sparse, nested, mkldnn), or a negated view.
TensorArg read_tensor(PyObject* value, const char* name, TensorReader reader = TensorReader::kFastest);

}  // namespace titok
