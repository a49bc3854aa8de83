#include "group_norm_silu.h"

#include "module.h"

namespace titok {

namespace py = pybind11;

void bind_group_norm_silu(py::module_& m) {
  m.def(
      "group_norm_silu",
      [](uintptr_t x, uintptr_t residual, uintptr_t sum, uintptr_t out, bool x_is_bf16, bool out_is_bf16,
         uintptr_t weight, uintptr_t bias, uintptr_t mean, uintptr_t rstd, int64_t batch, int64_t pixels,
         int64_t channels, int64_t groups, double eps) {
        GroupNormSiluArgs args{};
        args.x = reinterpret_cast<const void*>(x);
        args.residual = reinterpret_cast<const void*>(residual);
        args.sum = reinterpret_cast<void*>(sum);
        args.out = reinterpret_cast<void*>(out);
        args.x_is_bf16 = x_is_bf16;
        args.out_is_bf16 = out_is_bf16;
        args.weight = reinterpret_cast<const float*>(weight);
        args.bias = reinterpret_cast<const float*>(bias);
        args.mean = reinterpret_cast<float*>(mean);
        args.rstd = reinterpret_cast<float*>(rstd);
        args.batch = batch;
        args.pixels = pixels;
        args.channels = channels;
        args.groups = groups;
        args.eps = eps;
        py::gil_scoped_release unlocked;
        launch_group_norm_silu(args);
      },
      py::arg("x"), py::arg("residual"), py::arg("sum"), py::arg("out"), py::arg("x_is_bf16"),
      py::arg("out_is_bf16"), py::arg("weight"), py::arg("bias"), py::arg("mean"), py::arg("rstd"),
      py::arg("batch"), py::arg("pixels"), py::arg("channels"), py::arg("groups"), py::arg("eps"),
      "GroupNorm + SiLU of a channels-last map at raw addresses; see csrc/group_norm_silu.h.");
}

}  // namespace titok
