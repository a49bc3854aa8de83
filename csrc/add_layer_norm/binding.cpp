// titok._C.add_layer_norm and its backward: checks tensors and hands their memory to the launchers.
#include "add_layer_norm/add_layer_norm.h"
#include "module.h"

namespace titok {
namespace {

constexpr auto kRowTypes = {DType::kFloat32, DType::kBFloat16};

void check_rows(const TensorArg& tensor) {
  expect_dtype(tensor, kRowTypes);
  if (tensor.ndim < 1) raise_value_error(tensor.name, "at least one dimension", shape_of(tensor));
  expect_contiguous(tensor);
}

void check_like(const TensorArg& tensor, const TensorArg& like) {
  check_rows(tensor);
  expect_shape_of(tensor, like);
}

void check_parameter(const TensorArg& tensor, std::initializer_list<DType> dtypes, int64_t width) {
  expect_dtype(tensor, dtypes);
  expect_shape(tensor, {width});
  expect_contiguous(tensor);
}

PyObject* add_layer_norm(Call& call) {
  const TensorArg x = call.tensor("x"), residual = call.optional_tensor("residual");
  const TensorArg weight = call.tensor("weight"), bias = call.tensor("bias");
  const float eps = static_cast<float>(call.number("eps"));
  const TensorArg total = call.optional_tensor("total"), normalised = call.tensor("normalised");

  check_rows(x);
  if (residual.given) check_like(residual, x);
  check_parameter(weight, kRowTypes, x.size(-1));
  check_parameter(bias, {weight.dtype}, x.size(-1));
  expect_given(total, residual.given, residual.given ? "beside a residual" : "without a residual");
  if (total.given) {
    check_like(total, x);
    const bool wide = x.dtype == DType::kFloat32 || residual.dtype == DType::kFloat32;
    expect_dtype(total, {wide ? DType::kFloat32 : DType::kBFloat16});
  }
  check_like(normalised, x);
  if (x.numel() == 0) Py_RETURN_NONE;

  AddLayerNormArgs args{};
  args.x = x.data;
  args.residual = residual.data;
  args.total = total.data;
  args.normalised = normalised.data;
  args.weight = weight.data;
  args.bias = bias.data;
  args.x_dtype = x.dtype;
  args.residual_dtype = residual.given ? residual.dtype : DType::kFloat32;
  args.normalised_dtype = normalised.dtype;
  args.weight_dtype = weight.dtype;
  args.rows = x.product(0, x.ndim - 1);
  args.width = x.size(-1);
  args.eps = eps;
  {
    const WithoutGil released;
    launch_add_layer_norm(args);
  }
  Py_RETURN_NONE;
}

PyObject* add_layer_norm_backward(Call& call) {
  const TensorArg grad_total = call.optional_tensor("grad_total"), grad_normalised = call.tensor("grad_normalised");
  const TensorArg total = call.tensor("total"), weight = call.tensor("weight");
  const float eps = static_cast<float>(call.number("eps"));
  const TensorArg grad = call.tensor("grad"), partial = call.tensor("partial");

  check_rows(total);
  if (grad_total.given) {
    check_like(grad_total, total);
    expect_dtype(grad_total, {total.dtype});
  }
  check_like(grad_normalised, total);
  check_parameter(weight, kRowTypes, total.size(-1));
  check_like(grad, total);
  expect_dtype(grad, {total.dtype});
  const int64_t rows = total.product(0, total.ndim - 1);
  expect_dtype(partial, {DType::kFloat32});
  expect_shape(partial, {add_layer_norm_chunks(rows), 2, total.size(-1)});
  expect_contiguous(partial);
  if (total.numel() == 0) Py_RETURN_NONE;

  AddLayerNormBackwardArgs args{};
  args.grad_total = grad_total.data;
  args.grad_normalised = grad_normalised.data;
  args.total = total.data;
  args.grad = grad.data;
  args.weight = weight.data;
  args.partial = partial.as<float>();
  args.normalised_dtype = grad_normalised.dtype;
  args.total_dtype = total.dtype;
  args.weight_dtype = weight.dtype;
  args.rows = rows;
  args.width = total.size(-1);
  args.eps = eps;
  {
    const WithoutGil released;
    launch_add_layer_norm_backward(args);
  }
  Py_RETURN_NONE;
}

PyObject* chunks(Call& call) {
  return PyLong_FromLongLong(add_layer_norm_chunks(call.integer("rows", 0, INT64_MAX / 2)));
}

PyMethodDef kFunctions[] = {
    python_function<add_layer_norm, 7>(
        "add_layer_norm",
        "add_layer_norm($module, x, residual, weight, bias, eps, total, normalised, /)\n--\n\n"
        "total = x + residual; normalised = LayerNorm(total) over the last dimension. CPU tensors.\n\n"
        "x, residual (..., D) float32 or bfloat16, contiguous; weight, bias (D,), one of these dtypes.\n"
        "total takes the wider of the two dtypes, normalised either. residual and total may both be None."),
    python_function<add_layer_norm_backward, 7>(
        "add_layer_norm_backward",
        "add_layer_norm_backward($module, grad_total, grad_normalised, total, weight, eps, grad, partial, /)\n--\n\n"
        "Gradient of the sum, into grad, and those of weight and bias by chunks of rows, into partial\n"
        "(add_layer_norm_chunks(rows), 2, D) float32, to be summed over its first dimension."),
    python_function<chunks, 1>(
        "add_layer_norm_chunks",
        "add_layer_norm_chunks($module, rows, /)\n--\n\n"
        "Chunks that add_layer_norm_backward cuts this many rows into: a function of their number alone, so that\n"
        "results do not depend on the number of threads."),
    {}};

}  // namespace

int bind_add_layer_norm(PyObject* module) { return PyModule_AddFunctions(module, kFunctions); }

}  // namespace titok
