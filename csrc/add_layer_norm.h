// Residual add and LayerNorm of rows, forward and backward: arguments and entry points.
#pragma once

#include <cstdint>

namespace titok {

// Matrices are (rows, width), contiguous; float32, or bfloat16 where *_is_bf16 says so.
struct AddLayerNormArgs {
  const void* x;
  const void* residual;
  const float* weight;  // (width)
  const float* bias;    // (width)
  void* total;          // x + residual; bfloat16 if both are, else float32
  void* normalised;
  bool x_is_bf16;
  bool residual_is_bf16;
  bool normalised_is_bf16;
  int64_t rows;
  int64_t width;
  float eps;
};

// d weight and d bias are left as partial sums, one for each of `parts` runs of rows, so that the result does not
// depend on the number of threads.
struct AddLayerNormBackwardArgs {
  const void* grad_total;  // dtype of total; null for none
  const void* grad_normalised;
  const void* total;
  const float* weight;
  void* grad;      // of the sum, dtype of total
  float* partial;  // (2, parts, width): d weight, d bias
  bool total_is_bf16;
  bool grad_normalised_is_bf16;
  int64_t rows;
  int64_t width;
  int64_t parts;
  float eps;
};

void launch_add_layer_norm(const AddLayerNormArgs& args);
void launch_add_layer_norm_backward(const AddLayerNormBackwardArgs& args);

#define TITOK_DECLARE(isa)                                                                            \
  namespace isa {                                                                                     \
  void add_layer_norm(const AddLayerNormArgs& args, float* scratch, int64_t stride);                   \
  void add_layer_norm_backward(const AddLayerNormBackwardArgs& args, float* scratch, int64_t stride); \
  }
TITOK_DECLARE(generic)
TITOK_DECLARE(avx2)
TITOK_DECLARE(avx512)
#undef TITOK_DECLARE

}  // namespace titok
