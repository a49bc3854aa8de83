// GroupNorm and SiLU on channels-last maps, optionally of the sum of two maps: arguments and entry point.
#pragma once

#include <cstdint>

namespace titok {

struct GroupNormSiluArgs {
  // Maps are (batch, pixels, channels), contiguous; float32, or bfloat16 where *_is_bf16 says so.
  const void* x;
  const void* residual;  // null for none; dtype of x
  void* sum;             // x + residual rounded to x's dtype; null exactly when residual is
  void* out;
  bool x_is_bf16;
  bool out_is_bf16;
  const void* weight;  // (channels), float32 or bfloat16
  const void* bias;    // (channels), type of weight
  bool weight_is_bf16;
  float* mean;  // (batch, groups), output; null where nobody wants it
  float* rstd;  // the same
  int64_t batch;
  int64_t pixels;
  int64_t channels;
  int64_t groups;  // divides channels
  double eps;
  bool stream;  // write past the caches
};

// Pixels are summed in chunks of a size that depends on the shape alone, so that results do not depend on the
// number of threads. `scratch` is double[threads * group_norm_silu_scratch(args)].
inline int64_t group_norm_silu_chunk(const GroupNormSiluArgs& a) {
  const int64_t pixels = (int64_t{1} << 15) / a.channels;
  return pixels < 8 ? 8 : pixels;
}
inline int64_t group_norm_silu_chunks(const GroupNormSiluArgs& a) {
  return (a.pixels + group_norm_silu_chunk(a) - 1) / group_norm_silu_chunk(a);
}
inline int64_t group_norm_silu_padded(const GroupNormSiluArgs& a) { return (a.channels + 31) / 32 * 32; }
inline int64_t group_norm_silu_scratch(const GroupNormSiluArgs& a) {
  return (group_norm_silu_chunks(a) + 1) * 2 * group_norm_silu_padded(a);  // sums per chunk; mean, scale and shift
}

void launch_group_norm_silu(const GroupNormSiluArgs& args);

namespace generic {
void group_norm_silu(const GroupNormSiluArgs& args, double* scratch, int threads);
}
namespace avx2 {
void group_norm_silu(const GroupNormSiluArgs& args, double* scratch, int threads);
}
namespace avx512 {
void group_norm_silu(const GroupNormSiluArgs& args, double* scratch, int threads);
}

}  // namespace titok
