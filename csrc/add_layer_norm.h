// LayerNorm of rows, or of the sum of two: arguments and entry point.
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

// x may be `sum` or, without a residual, `out`, where types allow.
void launch_add_layer_norm(const AddLayerNormArgs& args);

// One instruction set's: rows [begin, end). `stream` writes past the caches.
using AddLayerNormRows = void(const AddLayerNormArgs& args, int64_t begin, int64_t end, bool stream);
namespace generic {
AddLayerNormRows add_layer_norm;
}
namespace avx2 {
AddLayerNormRows add_layer_norm;
}
namespace avx512 {
AddLayerNormRows add_layer_norm;
}

}  // namespace titok
