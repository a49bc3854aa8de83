// Declarations of the bind_<op> functions that module.cpp calls.
#pragma once

#include <pybind11/pybind11.h>

namespace titok {

void bind_add_layer_norm(pybind11::module_& m);
void bind_masked_attention(pybind11::module_& m);
void bind_maskgit_decode(pybind11::module_& m);
void bind_nearest_codebook(pybind11::module_& m);
void bind_group_norm_silu(pybind11::module_& m);

}  // namespace titok
