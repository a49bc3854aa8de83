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
  expect_contiguous(weight, kMapTypes, {channels});
  expect_contiguous(bias, {weight.dtype}, {channels});
  expect_given(total, residual.given, residual.given ? "beside a residual" : "without a residual");
  if (total.given) check_map(total, {x.dtype}, x);
  check_map(normalised, kMapTypes, x);
  for (const TensorArg* statistic : {&mean, &rstd}) {
    if (statistic->given) expect_contiguous(*statistic, {DType::kFloat32}, {batch, groups});
  }
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

PyObject* group_norm_silu_backward(Call& call) {
  const TensorArg grad = call.tensor("grad"), grad_total = call.optional_tensor("grad_total");
  const TensorArg x = call.tensor("x"), weight = call.tensor("weight"), bias = call.tensor("bias");
  const TensorArg mean = call.tensor("mean"), rstd = call.tensor("rstd"), grad_x = call.tensor("grad_x");
  const TensorArg grad_weight = call.tensor("grad_weight"), grad_bias = call.tensor("grad_bias");

  check_map(x, kMapTypes, x);
  check_map(grad, kMapTypes, x);
  if (grad_total.given) check_map(grad_total, {x.dtype}, x);
  check_map(grad_x, {x.dtype}, x);
  const int64_t batch = x.size(0), channels = x.size(1);
  expect_contiguous(weight, kMapTypes, {channels});
  expect_contiguous(bias, {weight.dtype}, {channels});
  expect_contiguous(mean, {DType::kFloat32}, {batch, kAnySize});
  const int64_t groups = mean.size(1);
  if (groups < 1 || channels % groups != 0) {
    raise_value_error("mean", "a divisor of the " + std::to_string(channels) + " channels of x as its second size",
                      std::to_string(groups));
  }
  expect_contiguous(rstd, {DType::kFloat32}, {batch, groups});
  for (const TensorArg* sum : {&grad_weight, &grad_bias}) expect_contiguous(*sum, {DType::kFloat32}, {channels});
  if (x.numel() == 0) Py_RETURN_NONE;

  GroupNormSiluBackwardArgs args{};
  args.grad = grad.data;
  args.grad_total = grad_total.data;
  args.x = x.data;
  args.weight = weight.data;
  args.bias = bias.data;
  args.mean = mean.as<const float>();
  args.rstd = rstd.as<const float>();
  args.grad_x = grad_x.data;
  args.grad_weight = grad_weight.as<float>();
  args.grad_bias = grad_bias.as<float>();
  args.map_dtype = x.dtype;
  args.grad_dtype = grad.dtype;
  args.parameter_dtype = weight.dtype;
  args.batch = batch;
  args.pixels = x.size(2) * x.size(3);
  args.channels = channels;
  args.groups = groups;
  {
    const WithoutGil released;
    launch_group_norm_silu_backward(args);
  }
  Py_RETURN_NONE;
}

PyMethodDef kFunctions[] = {
    python_function<group_norm_silu, 10>(
        "group_norm_silu",
        "group_norm_silu($module, x, residual, num_groups, weight, bias, eps, total, normalised, mean, rstd, /)\n"
        "--\n\n"
        "total = x + residual; normalised = SiLU(GroupNorm(total)). CPU tensors.\n\n"
        "x (B, C, H, W) float32 or bfloat16 in channels-last memory, like all maps; residual and total of its\n"
        "dtype, or both None; normalised of either dtype; weight, bias (C,) of one dtype, float32 or bfloat16;\n"
        "mean, rstd (B, num_groups) float32, or None. If x has no element, nothing is written."),
    python_function<group_norm_silu_backward, 10>(
        "group_norm_silu_backward",
        "group_norm_silu_backward($module, grad, grad_total, x, weight, bias, mean, rstd, grad_x, grad_weight,\n"
        "grad_bias, /)\n"
        "--\n\n"
        "The gradients of what was normalised, weight and bias, from that of the normalised map. CPU tensors.\n\n"
        "x (B, C, H, W) float32 or bfloat16 in channels-last memory, like all maps; grad of either dtype;\n"
        "grad_total, which is added to grad_x, and grad_x of x's dtype, the former or None; weight, bias (C,) of\n"
        "one dtype, float32 or bfloat16; mean, rstd (B, num_groups) and grad_weight, grad_bias (C,) float32. If x\n"
        "has no element, nothing is written."),
    {}};

}  // namespace

int bind_group_norm_silu(PyObject* module) { return PyModule_AddFunctions(module, kFunctions); }

}  // namespace titok
