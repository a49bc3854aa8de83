// titok._C.nearest_codebook: checks tensors and hands their memory to the search.
#include "module.h"
#include "nearest_codebook/nearest_codebook.h"

namespace titok {
namespace {

// Codes are int32 inside the search, offsets within a block of latents int.
constexpr int64_t kMaxCodes = INT32_MAX - 1024, kMaxWidth = int64_t{1} << 24;

RowMatrix check_rows(const TensorArg& matrix, int64_t width) {
  expect_dtype(matrix, {DType::kFloat32, DType::kBFloat16, DType::kFloat16});
  expect_shape(matrix, {kAnySize, width});
  expect_dense_last_dimension(matrix);
  return {matrix.data, matrix.dtype, matrix.size(0), matrix.stride(0)};
}

PyObject* nearest_codebook(Call& call) {
  const TensorArg latents = call.tensor("latents"), codebook = call.tensor("codebook");
  const bool normalize = call.boolean("normalize");
  const TensorArg out = call.tensor("out");

  NearestCodebookArgs args{};
  args.codebook = check_rows(codebook, kAnySize);
  const int64_t codes = codebook.size(0), width = codebook.size(1);
  if (codes < 1 || codes > kMaxCodes || width < 1 || width > kMaxWidth) {
    raise_value_error("codebook", "shape (V, C) with V in [1, " + std::to_string(kMaxCodes) + "] and C in [1, " +
                                      std::to_string(kMaxWidth) + "]", shape_of(codebook));
  }
  args.latents = check_rows(latents, width);
  expect_dtype(out, {DType::kInt64});
  expect_shape(out, {latents.size(0)});
  expect_contiguous(out);
  if (latents.size(0) == 0) Py_RETURN_NONE;
  args.width = static_cast<int32_t>(width);
  args.normalize = normalize;
  args.out = out.as<int64_t>();
  {
    const WithoutGil released;
    launch_nearest_codebook(args);
  }
  Py_RETURN_NONE;
}

PyMethodDef kFunctions[] = {
    python_function<nearest_codebook, 4>(
        "nearest_codebook",
        "nearest_codebook($module, latents, codebook, normalize, out, /)\n--\n\n"
        "Index of the nearest row of codebook (V, C) for each row of latents (M, C), into out (M,) int64. CPU tensors.\n\n"
        "latents, codebook float32, bfloat16 or float16, each with dense rows that lie any distance apart; normalize: "
        "divide\nall rows by their l2 norms first."),
    {}};

}  // namespace

int bind_nearest_codebook(PyObject* module) { return PyModule_AddFunctions(module, kFunctions); }

}  // namespace titok
