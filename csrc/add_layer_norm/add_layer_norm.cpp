// Shares the rows of add_layer_norm among threads.
#include "add_layer_norm/add_layer_norm.h"

#include "common/huge_pages.h"
#include "common/threads.h"

namespace titok {
namespace {

constexpr int64_t kElementsPerThread = 1 << 14;      // fewer take less time than waking a thread
constexpr int64_t kStreamBytes = int64_t{64} << 20;  // larger results do not stay in the caches anyway

const AddLayerNormKernels& kernels_for_this_cpu() {
  return for_this_cpu([](auto isa) -> const AddLayerNormKernels& { return add_layer_norm_kernels(isa); });
}

int threads_for_elements(int64_t elements) {
  return threads_for(static_cast<double>(elements + kElementsPerThread), kElementsPerThread);
}

}  // namespace

void launch_add_layer_norm(const AddLayerNormArgs& args) {
  const AddLayerNormKernels& kernels = kernels_for_this_cpu();
  const int64_t elements = args.rows * args.width;
  if (elements < 2 * kElementsPerThread) return kernels.forward(args, 0, args.rows, false);

  const int64_t out_bytes = elements * bytes_of(args.normalised_dtype);
  ask_for_huge_pages(args.normalised, out_bytes);
  if (args.total) {
    ask_for_huge_pages(args.total, elements * std::max(bytes_of(args.x_dtype), bytes_of(args.residual_dtype)));
  }
  const bool aligned = args.width % 64 == 0 && reinterpret_cast<uintptr_t>(args.normalised) % kCacheLine == 0;
  const bool stream = aligned && out_bytes >= kStreamBytes;
#pragma omp parallel num_threads(threads_for_elements(elements))
  {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    kernels.forward(args, args.rows * thread / threads, args.rows * (thread + 1) / threads, stream);
  }
}

void launch_add_layer_norm_backward(const AddLayerNormBackwardArgs& args) {
  const AddLayerNormKernels& kernels = kernels_for_this_cpu();
  const int64_t chunks = add_layer_norm_chunks(args.rows);
  const int threads = threads_for_elements(args.rows * args.width);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    const std::unique_ptr<float[]> scratch(new float[2 * add_layer_norm_padded(args.width)]);
    kernels.backward(args, chunks * thread / team, chunks * (thread + 1) / team, scratch.get());
  }
}

}  // namespace titok
