// The Python module titok._C: one bind_<op> per op, each defined in csrc/<op>_binding.cpp.
#include <pybind11/pybind11.h>

#include "cpu_isa.h"
#include "module.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of titok. Import torch first: both share one OpenMP runtime.";
#ifdef TITOK_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
  m.def("cpu_isa", &titok::cpu_isa_name, "Instruction set that the CPU kernels use here: generic, avx2 or avx512.");
  titok::bind_add_layer_norm(m);
  titok::bind_masked_attention(m);
  titok::bind_maskgit_decode(m);
  titok::bind_nearest_codebook(m);
  titok::bind_group_norm_silu(m);
}
