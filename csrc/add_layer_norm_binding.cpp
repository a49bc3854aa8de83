// titok._C.add_layer_norm: addresses and sizes in, nothing out. titok/ops/add_layer_norm.py checks them.
#include <pybind11/pybind11.h>

#include "add_layer_norm.h"
#include "module.h"

namespace py = pybind11;

namespace titok {

void bind_add_layer_norm(py::module_& m) {
  m.def(
      "add_layer_norm",
      [](uintptr_t x, int x_type, uintptr_t residual, int residual_type, uintptr_t sum, uintptr_t out, int out_type,
         uintptr_t weight, uintptr_t bias, int weight_type, int64_t rows, int64_t width, float eps) {
        AddLayerNormArgs args{};
        args.x = reinterpret_cast<const void*>(x);
        args.residual = reinterpret_cast<const void*>(residual);
        args.sum = reinterpret_cast<void*>(sum);
        args.out = reinterpret_cast<void*>(out);
        args.weight = reinterpret_cast<const void*>(weight);
        args.bias = reinterpret_cast<const void*>(bias);
        args.x_type = static_cast<RowType>(x_type);
        args.residual_type = static_cast<RowType>(residual_type);
        args.out_type = static_cast<RowType>(out_type);
        args.weight_type = static_cast<RowType>(weight_type);
        args.rows = rows;
        args.width = width;
        args.eps = eps;
        launch_add_layer_norm(args);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace titok
