// titok._C.group_norm_silu: checks tensors and hands their memory to the launcher.
#include "group_norm_silu/group_norm_silu.h"
#include "module.h"

namespace titok {
namespace {

constexpr auto kMapTypes = {DType::kFloat32, DType::kBFloat16};

void check_map(const TensorArg& map, std::initializer_list<DType> dtypes, const TensorArg& like) {
  expect_dtype(map, dtypes);
  expect_channels_last(map);
  expect_shape_of(map, like);
}

void check_parameter(const TensorArg& tensor, std::initializer_list<DType> dtypes, int64_t channels) {
  expect_dtype(tensor, dtypes);
  expect_shape(tensor, {channels});
  expect_contiguous(tensor);
}

void check_statistic(const TensorArg& tensor, int64_t batch, int64_t groups) {
  if (!tensor.given) return;
  expect_dtype(tensor, {DType::kFloat32});
  expect_shape(tensor, {batch, groups});
  expect_contiguous(tensor);
}

PyObject* group_norm_silu(Call& call) {
  const TensorArg x = call.tensor("x"), residual = call.optional_tensor("residual");
  const int64_t groups = call.integer("num_groups", 1, INT64_MAX);
  const TensorArg weight = call.tensor("weight"), bias = call.tensor("bias");
  const double eps = call.number("eps");
  const TensorArg total = call.optional_tensor("total"), normalised = call.tensor("normalised");
  const TensorArg mean = call.optional_tensor("mean"), rstd = call.optional_tensor("rstd");

  check_map(x, kMapTypes, x);
  const int64_t batch = x.size(0), channels = x.size(1);
  if (residual.given) check_map(residual, {x.dtype}, x);
  if (channels % groups != 0) {
    raise_value_error("num_groups", "a divisor of the " + std::to_string(channels) + " channels of x",
                      std::to_string(groups));
  }
  check_parameter(weight, kMapTypes, channels);
  check_parameter(bias, {weight.dtype}, channels);
  expect_given(total, residual.given, residual.given ? "beside a residual" : "without a residual");
  if (total.given) check_map(total, {x.dtype}, x);
  check_map(normalised, kMapTypes, x);
  check_statistic(mean, batch, groups);
  check_statistic(rstd, batch, groups);
  if (x.numel() == 0) Py_RETURN_NONE;

  GroupNormSiluArgs args{};
  args.x = x.data;
  args.residual = residual.data;
  args.total = total.data;
  args.normalised = normalised.data;
  args.weight = weight.data;
  args.bias = bias.data;
  args.mean = mean.as<float>();
  args.rstd = rstd.as<float>();
  args.map_dtype = x.dtype;
  args.normalised_dtype = normalised.dtype;
  args.parameter_dtype = weight.dtype;
  args.batch = batch;
  args.pixels = x.size(2) * x.size(3);
  args.channels = channels;
  args.groups = groups;
  args.eps = eps;
  {
    const WithoutGil released;
    launch_group_norm_silu(args);
  }
  Py_RETURN_NONE;
}

PyMethodDef kFunctions[] = {
    python_function<group_norm_silu, 10>(
        "group_norm_silu",
        "group_norm_silu($module, x, residual, num_groups, weight, bias, eps, total, normalised, mean, rstd, /)\n"
        "--\n\n"
        "total = x + residual; normalised = SiLU(GroupNorm(total)). CPU tensors.\n\n"
        "x (B, C, H, W) float32 or bfloat16 in channels-last memory, as all maps here; residual and total like x, or\n"
        "both None; normalised of either dtype; weight, bias (C,) float32 or bfloat16; mean, rstd (B, num_groups)\n"
        "float32, or None. Nothing is written where x has no element."),
    {}};

}  // namespace

int bind_group_norm_silu(PyObject* module) { return PyModule_AddFunctions(module, kFunctions); }

}  // namespace titok
