// masked_attention on the CPU: shares (sample, head, block of queries) among threads, backward (sample, head).
#include "masked_attention/masked_attention.h"

#include <omp.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <new>

#include "common/cpu_isa.h"

namespace titok {
namespace {

constexpr double kWorkPerThread = 1 << 19;  // multiplications that are worth waking another thread for

struct Kernels {
  const MaskedAttentionKernels &forward, &backward;
};

Kernels kernels_for([[maybe_unused]] const MaskedAttentionArgs& args) {
  switch (cpu_isa()) {
#if defined(__x86_64__)
    case CpuIsa::kAvx512:
      if (args.is_bf16 && args.head_dim % 2 == 0 && cpu_multiplies_bf16()) {
        return {avx512bf16::kMaskedAttention, avx512bf16::kMaskedAttentionBackward};
      }
      return {avx512::kMaskedAttention, avx512::kMaskedAttentionBackward};
    case CpuIsa::kAvx2: return {avx2::kMaskedAttention, avx2::kMaskedAttentionBackward};
#endif
    default: return {generic::kMaskedAttention, generic::kMaskedAttentionBackward};
  }
}

struct Aligned {
  void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{64}); }
};

void launch(const MaskedAttentionKernels& kernels, const MaskedAttentionArgs& args, int64_t items, double products) {
  const double work = products * args.batch * args.heads * args.queries * args.tokens * args.head_dim;
  // torch's number of threads: both share one OpenMP runtime
  const double limit = std::min<double>(omp_get_max_threads(), items);
  const int threads = static_cast<int>(std::clamp(work / kWorkPerThread, 1.0, std::max(limit, 1.0)));
  const int64_t scratch_bytes = (kernels.scratch_bytes(args) + 63) / 64 * 64;
  const std::unique_ptr<std::byte, Aligned> scratch(
      static_cast<std::byte*>(::operator new(threads * scratch_bytes, std::align_val_t{64})));
  if (threads == 1) return kernels.run(args, 0, items, scratch.get());
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), all = omp_get_num_threads();
    kernels.run(args, items * thread / all, items * (thread + 1) / all, scratch.get() + thread * scratch_bytes);
  }
}

}  // namespace

void launch_masked_attention(const MaskedAttentionArgs& args) {
  const int64_t blocks = (args.queries + kQueryBlock - 1) / kQueryBlock;
  launch(kernels_for(args).forward, args, args.batch * args.heads * blocks, 2);
}

void launch_masked_attention_backward(const MaskedAttentionArgs& args) {
  if (args.queries == 0) {
    const int64_t elements = args.batch * args.tokens * 3 * args.heads * args.head_dim;
    std::memset(args.dqkv, 0, elements * (args.is_bf16 ? 2 : 4));
    return;
  }
  launch(kernels_for(args).backward, args, args.batch * args.heads, 5);
}

}  // namespace titok
