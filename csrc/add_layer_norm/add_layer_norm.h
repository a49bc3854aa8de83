// LayerNorm over rows (Ba, Kiros and Hinton 2016), optionally of the sum of two tensors, and its gradient:
// arguments and entry points.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "common/dtype.h"

namespace titok {

// Every dtype is float32 or bfloat16.
struct AddLayerNormArgs {
  const void* x;         // (rows, width) x_dtype, contiguous, as are all tensors here
  const void* residual;  // (rows, width) residual_dtype, or null: nothing is added
  void* total;           // (rows, width), output: x + residual in the wider of their dtypes; null without residual
  void* normalised;      // (rows, width) normalised_dtype, output
  const void* weight;    // (width) weight_dtype
  const void* bias;      // (width) weight_dtype
  DType x_dtype;
  DType residual_dtype;
  DType normalised_dtype;
  DType weight_dtype;
  int64_t rows;
  int64_t width;
  float eps;  // added to the variance
};

struct AddLayerNormBackwardArgs {
  const void* grad_total;       // (rows, width) total_dtype, or null: zero
  const void* grad_normalised;  // (rows, width) normalised_dtype
  const void* total;            // (rows, width) total_dtype
  void* grad;                   // (rows, width) total_dtype, output: gradient of total
  const void* weight;           // (width) weight_dtype
  float* partial;  // (chunks, 2, width), output: gradients of weight and bias from the rows of each chunk
  DType normalised_dtype;
  DType total_dtype;
  DType weight_dtype;
  int64_t rows;
  int64_t width;
  float eps;
};

// Gradients of weight and bias are summed by chunks of rows, whose size depends on the number of rows alone, so
// that results do not depend on the number of threads. The last chunk may have fewer rows.
// Written without sums, which would overflow for as many rows as a tensor without elements may have.
constexpr int64_t add_layer_norm_chunk_rows(int64_t rows) { return rows > 16 * 64 ? (rows - 1) / 64 + 1 : 16; }
constexpr int64_t add_layer_norm_chunks(int64_t rows) {
  return rows > 0 ? (rows - 1) / add_layer_norm_chunk_rows(rows) + 1 : 0;
}

// `total` may be x or residual, and without a residual `normalised` may be x, where the dtypes are equal.
void launch_add_layer_norm(const AddLayerNormArgs& args);
void launch_add_layer_norm_backward(const AddLayerNormBackwardArgs& args);

// The loops of one instruction set.
struct AddLayerNormKernels {
  // Rows [begin, end). `stream` writes `normalised` past the caches.
  void (*forward)(const AddLayerNormArgs& args, int64_t begin, int64_t end, bool stream);
  // Chunks [begin, end). `scratch` holds 2 * add_layer_norm_padded(width) floats of this thread.
  void (*backward)(const AddLayerNormBackwardArgs& args, int64_t begin, int64_t end, float* scratch);
};
// The width rounded up to whole pairs of vectors.
constexpr int64_t add_layer_norm_padded(int64_t width) { return (width + 31) / 32 * 32; }
const AddLayerNormKernels& add_layer_norm_kernels(Generic);
const AddLayerNormKernels& add_layer_norm_kernels(Avx2);
const AddLayerNormKernels& add_layer_norm_kernels(Avx512);

}  // namespace titok
