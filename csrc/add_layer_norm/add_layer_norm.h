// LayerNorm of rows, or of the sum of two, and its gradient: arguments and entry points.
#pragma once

#include <cstdint>

namespace titok {

enum class RowType : int { kFloat32 = 0, kBFloat16 = 1 };

struct AddLayerNormArgs {
  // (rows, width), contiguous
  const void* x;
  const void* residual;  // null for none
  void* sum;             // x + residual in the wider of their types; null exactly when residual is
  void* out;
  const void* weight;  // (width)
  const void* bias;    // (width), type of weight
  RowType x_type;
  RowType residual_type;
  RowType out_type;
  RowType weight_type;
  int64_t rows;
  int64_t width;
  float eps;
};

struct AddLayerNormBackwardArgs {
  // (rows, width), contiguous
  const void* grad_sum;  // type of sum; null for none
  const void* grad_out;
  const void* sum;
  void* grad;  // of sum, in its type
  const void* weight;
  float* partial;  // (chunks, 2, width): sums over the rows of a chunk for the gradients of weight and bias
  RowType out_type;
  RowType sum_type;
  RowType weight_type;
  int64_t rows;
  int64_t width;
  int64_t chunk_rows;  // the last chunk may have fewer
  float eps;
};

// x may be `sum` or, without a residual, `out`, where types allow.
void launch_add_layer_norm(const AddLayerNormArgs& args);
void launch_add_layer_norm_backward(const AddLayerNormBackwardArgs& args);

// One instruction set's: rows [begin, end), where `stream` writes past the caches, and chunks [begin, end). `scratch`
// holds two rows of float32, padded to whole vectors.
struct AddLayerNormKernels {
  void (*forward)(const AddLayerNormArgs& args, int64_t begin, int64_t end, bool stream);
  void (*backward)(const AddLayerNormBackwardArgs& args, int64_t begin, int64_t end, float* scratch);
};
constexpr int64_t add_layer_norm_padded(int64_t width) { return (width + 31) / 32 * 32; }
namespace generic {
extern const AddLayerNormKernels kAddLayerNorm;
}
namespace avx2 {
extern const AddLayerNormKernels kAddLayerNorm;
}
namespace avx512 {
extern const AddLayerNormKernels kAddLayerNorm;
}

}  // namespace titok
