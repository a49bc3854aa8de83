#include "add_layer_norm.h"

#include <omp.h>

#include <memory>

#include "cpu_isa.h"

namespace titok {
namespace {

// One row of floats to a thread, padded to whole cache lines.
struct Scratch {
  explicit Scratch(int64_t width) : stride((width + 31) / 16 * 16), floats(new float[omp_get_max_threads() * stride]) {}
  int64_t stride;
  std::unique_ptr<float[]> floats;
};

}  // namespace

void launch_add_layer_norm(const AddLayerNormArgs& args) {
  const Scratch scratch(args.width);
  switch (cpu_isa()) {
#if defined(__x86_64__)
    case CpuIsa::kAvx512: return avx512::add_layer_norm(args, scratch.floats.get(), scratch.stride);
    case CpuIsa::kAvx2: return avx2::add_layer_norm(args, scratch.floats.get(), scratch.stride);
#endif
    default: return generic::add_layer_norm(args, scratch.floats.get(), scratch.stride);
  }
}

void launch_add_layer_norm_backward(const AddLayerNormBackwardArgs& args) {
  const Scratch scratch(args.width);
  switch (cpu_isa()) {
#if defined(__x86_64__)
    case CpuIsa::kAvx512: return avx512::add_layer_norm_backward(args, scratch.floats.get(), scratch.stride);
    case CpuIsa::kAvx2: return avx2::add_layer_norm_backward(args, scratch.floats.get(), scratch.stride);
#endif
    default: return generic::add_layer_norm_backward(args, scratch.floats.get(), scratch.stride);
  }
}

}  // namespace titok
