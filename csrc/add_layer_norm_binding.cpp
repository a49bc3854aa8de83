// titok._C.add_layer_norm and its backward: addresses and sizes in, nothing out. titok/ops/add_layer_norm.py checks them.
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
  m.def(
      "add_layer_norm_backward",
      [](uintptr_t grad_sum, uintptr_t grad_out, int out_type, uintptr_t sum, uintptr_t grad, int sum_type,
         uintptr_t weight, int weight_type, uintptr_t partial, int64_t rows, int64_t width, int64_t chunk_rows,
         float eps) {
        AddLayerNormBackwardArgs args{};
        args.grad_sum = reinterpret_cast<const void*>(grad_sum);
        args.grad_out = reinterpret_cast<const void*>(grad_out);
        args.sum = reinterpret_cast<const void*>(sum);
        args.grad = reinterpret_cast<void*>(grad);
        args.weight = reinterpret_cast<const void*>(weight);
        args.partial = reinterpret_cast<float*>(partial);
        args.out_type = static_cast<RowType>(out_type);
        args.sum_type = static_cast<RowType>(sum_type);
        args.weight_type = static_cast<RowType>(weight_type);
        args.rows = rows;
        args.width = width;
        args.chunk_rows = chunk_rows;
        args.eps = eps;
        launch_add_layer_norm_backward(args);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace titok
