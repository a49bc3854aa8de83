#include "group_norm_silu.h"

#include "module.h"

namespace titok {

namespace py = pybind11;

void bind_group_norm_silu(py::module_& m) {
  m.def(
      "group_norm_silu",
      [](uintptr_t x, uintptr_t residual, uintptr_t sum, uintptr_t out, bool x_is_bf16, bool out_is_bf16,
         uintptr_t weight, uintptr_t bias, bool weight_is_bf16, uintptr_t mean, uintptr_t rstd, int64_t batch,
         int64_t pixels, int64_t channels, int64_t groups, double eps) {
        GroupNormSiluArgs args{};
        args.x = reinterpret_cast<const void*>(x);
        args.residual = reinterpret_cast<const void*>(residual);
        args.sum = reinterpret_cast<void*>(sum);
        args.out = reinterpret_cast<void*>(out);
        args.x_is_bf16 = x_is_bf16;
        args.out_is_bf16 = out_is_bf16;
        args.weight = reinterpret_cast<const void*>(weight);
        args.bias = reinterpret_cast<const void*>(bias);
        args.weight_is_bf16 = weight_is_bf16;
        args.mean = reinterpret_cast<float*>(mean);
        args.rstd = reinterpret_cast<float*>(rstd);
        args.batch = batch;
        args.pixels = pixels;
        args.channels = channels;
        args.groups = groups;
        args.eps = eps;
        launch_group_norm_silu(args);
      },
      py::call_guard<py::gil_scoped_release>(),
      "GroupNorm + SiLU of a channels-last map at raw addresses; see csrc/group_norm_silu.h.");
}

}  // namespace titok
