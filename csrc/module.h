// Declarations of the bind_<op> functions that module.cpp calls. Each adds the functions of one op to the module
// and returns 0, or -1 with a Python exception set.
#pragma once

#include "common/python_call.h"

namespace titok {

int bind_add_layer_norm(PyObject* module);
int bind_group_norm_silu(PyObject* module);
int bind_int8_linear(PyObject* module);
int bind_masked_attention(PyObject* module);
int bind_masked_decode(PyObject* module);
int bind_maskgit_decode(PyObject* module);
int bind_nearest_codebook(PyObject* module);

}  // namespace titok
