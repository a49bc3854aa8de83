// Shares the work of masked_attention among threads and gives each its memory.
#include "masked_attention/masked_attention.h"

#include <cstring>

#include "common/threads.h"

namespace titok {
namespace {

constexpr double kProductsPerThread = 1 << 19;  // fewer multiplications take less time than waking a thread

// The kernel of this direction: `kernel_of` returns it for the tag of an instruction set.
template <class KernelOf>
MaskedAttentionKernel choose([[maybe_unused]] const MaskedAttentionArgs& args, KernelOf kernel_of) {
#if defined(__x86_64__)
  if (args.dtype == DType::kBFloat16 && args.head_dim % 2 == 0 && cpu_multiplies_bf16()) return kernel_of(Avx512Bf16{});
#endif
  return for_this_cpu(kernel_of);
}

// `matrix_products`: how many products of a (queries, tokens) and a (tokens, head_dim) matrix each head takes.
void run(const MaskedAttentionKernel& kernel, const MaskedAttentionArgs& args, int64_t items, double matrix_products) {
  const double products = matrix_products * args.batch * args.heads * args.queries * args.tokens * args.head_dim;
  const int threads = threads_for(products, kProductsPerThread, items);
  const int64_t scratch_bytes = divide_up(kernel.scratch_bytes(args), kCacheLine) * kCacheLine;
  const AlignedBuffer scratch = allocate_aligned(threads * scratch_bytes);
  if (threads == 1) return kernel.run(args, 0, items, scratch.get());
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    kernel.run(args, items * thread / team, items * (thread + 1) / team, scratch.get() + thread * scratch_bytes);
  }
}

}  // namespace

void launch_masked_attention(const MaskedAttentionArgs& args) {
  const int64_t items = args.batch * args.heads * divide_up(args.queries, kQueryBlock);
  run(choose(args, [](auto isa) { return masked_attention_kernel(isa); }), args, items, 2);
}

void launch_masked_attention_backward(const MaskedAttentionArgs& args) {
  const int64_t items = args.batch * args.heads;
  if (args.queries == 0) {  // then no gradient reaches keys and values
    std::memset(args.dqkv, 0, items * args.tokens * 3 * args.head_dim * bytes_of(args.dtype));
    return;
  }
  run(choose(args, [](auto isa) { return masked_attention_backward_kernel(isa); }), args, items, 5);
}

}  // namespace titok
