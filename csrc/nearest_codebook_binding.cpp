// titok._C.nearest_codebook: addresses and sizes in, indices out. titok/ops/nearest_codebook.py checks them.
#include <pybind11/pybind11.h>

#include "module.h"
#include "nearest_codebook.h"

namespace py = pybind11;

namespace titok {

void bind_nearest_codebook(py::module_& m) {
  m.def(
      "nearest_codebook",
      [](uintptr_t latents, int latents_type, int64_t rows, int64_t latents_stride, uintptr_t codebook,
         int codebook_type, int64_t codes, int64_t codebook_stride, int width, bool normalize, uintptr_t out) {
        const RowMatrix z{reinterpret_cast<const void*>(latents), static_cast<FloatType>(latents_type), rows,
                          latents_stride};
        const RowMatrix e{reinterpret_cast<const void*>(codebook), static_cast<FloatType>(codebook_type), codes,
                          codebook_stride};
        nearest_codebook(z, e, width, normalize, reinterpret_cast<int64_t*>(out));
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace titok
