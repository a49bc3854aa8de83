// titok._C.int8_linear: checks tensors and hands their memory to the launcher.
#include "int8_linear/int8_linear.h"
#include "module.h"

namespace titok {
namespace {

PyObject* int8_linear(Call& call) {
  const TensorArg x = call.tensor("x"), weight = call.tensor("weight");
  const TensorArg scale = call.tensor("scale"), total = call.tensor("total");
  const TensorArg bias = call.optional_tensor("bias");
  const bool gelu = call.boolean("gelu");
  const TensorArg out = call.tensor("out");

  expect_dtype(x, {DType::kFloat32, DType::kBFloat16});
  expect_shape(x, {kAnySize, kAnySize});
  expect_contiguous(x);
  const int64_t inputs = x.size(1);
  if (inputs < 1 || inputs > kInt8MostInputs || inputs % kInt8Group != 0) {
    raise_value_error("x",
                      "columns in a multiple of " + std::to_string(kInt8Group) + " up to " +
                          std::to_string(kInt8MostInputs),
                      shape_of(x));
  }
  expect_contiguous(out, {x.dtype}, {x.size(0), kAnySize});
  const int64_t outputs = out.size(1), panels = int8_panels(outputs);
  expect_contiguous(weight, {DType::kInt8}, {panels, inputs / kInt8Group, kInt8Panel * kInt8Group});
  expect_contiguous(scale, {DType::kFloat32}, {panels * kInt8Panel});
  expect_contiguous(total, {DType::kFloat32}, {panels * kInt8Panel});
  if (bias.given) expect_contiguous(bias, {x.dtype}, {outputs});
  if (out.numel() == 0) Py_RETURN_NONE;

  Int8LinearArgs args{};
  args.x = x.data;
  args.weight = weight.as<int8_t>();
  args.scale = scale.as<float>();
  args.total = total.as<float>();
  args.bias = bias.given ? bias.data : nullptr;
  args.out = out.data;
  args.dtype = x.dtype;
  args.rows = x.size(0);
  args.inputs = inputs;
  args.outputs = outputs;
  args.gelu = gelu;
  {
    const WithoutGil released;
    launch_int8_linear(args);
  }
  Py_RETURN_NONE;
}

PyMethodDef kFunctions[] = {
    python_function<int8_linear, 7>(
        "int8_linear",
        "int8_linear($module, x, weight, scale, total, bias, gelu, out, /)\n--\n\n"
        "Writes x W^T + bias, or with `gelu` the exact GELU of it, into out (rows, O). CPU tensors.\n\n"
        "x (rows, C) float32 or bfloat16, contiguous, C a multiple of 4; it is quantised to 8 bits row by row. W is\n"
        "`weight` (P, C / 4, 64 * 4) int8 in P panels of 64 rows, padded with 0, times `scale`. `total` is the sum of\n"
        "each row of W. scale and total have one float32 for each row of the padded W. bias (O,) in the dtype of x, or\n"
        "None."),
    {}};

}  // namespace

int bind_int8_linear(PyObject* module) { return PyModule_AddFunctions(module, kFunctions); }

}  // namespace titok
