#include "add_layer_norm.h"

#include "module.h"

namespace titok {

namespace py = pybind11;

void bind_add_layer_norm(py::module_& m) {
  m.def(
      "add_layer_norm",
      [](uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t bias, uintptr_t total, uintptr_t normalised,
         bool x_is_bf16, bool residual_is_bf16, bool normalised_is_bf16, int64_t rows, int64_t width, float eps) {
        const AddLayerNormArgs args{reinterpret_cast<const void*>(x),
                                    reinterpret_cast<const void*>(residual),
                                    reinterpret_cast<const float*>(weight),
                                    reinterpret_cast<const float*>(bias),
                                    reinterpret_cast<void*>(total),
                                    reinterpret_cast<void*>(normalised),
                                    x_is_bf16,
                                    residual_is_bf16,
                                    normalised_is_bf16,
                                    rows,
                                    width,
                                    eps};
        py::gil_scoped_release unlocked;
        launch_add_layer_norm(args);
      },
      "Residual add and LayerNorm at raw addresses; arguments as in csrc/add_layer_norm.h.");
  m.def(
      "add_layer_norm_backward",
      [](uintptr_t grad_total, uintptr_t grad_normalised, uintptr_t total, uintptr_t weight, uintptr_t grad,
         uintptr_t partial, bool total_is_bf16, bool grad_normalised_is_bf16, int64_t rows, int64_t width,
         int64_t parts, float eps) {
        const AddLayerNormBackwardArgs args{reinterpret_cast<const void*>(grad_total),
                                            reinterpret_cast<const void*>(grad_normalised),
                                            reinterpret_cast<const void*>(total),
                                            reinterpret_cast<const float*>(weight),
                                            reinterpret_cast<void*>(grad),
                                            reinterpret_cast<float*>(partial),
                                            total_is_bf16,
                                            grad_normalised_is_bf16,
                                            rows,
                                            width,
                                            parts,
                                            eps};
        py::gil_scoped_release unlocked;
        launch_add_layer_norm_backward(args);
      },
      "Its gradients at raw addresses; arguments as in csrc/add_layer_norm.h.");
}

}  // namespace titok
