// Plans a call of group_norm_silu and gives it memory.
#include "group_norm_silu/group_norm_silu.h"

#include "common/huge_pages.h"
#include "common/threads.h"

namespace titok {
namespace {

// Above this many bytes of arguments and results they do not stay in a core's own caches, and a streamed store
// saves reading the line that it overwrites. A convolution that reads the result next takes no longer.
constexpr int64_t kStreamBytes = int64_t{8} << 20;
constexpr int64_t kChunkElements = int64_t{1} << 15;

GroupNormSiluPlan plan_for_shape(int64_t pixels, int64_t channels) {
  GroupNormSiluPlan plan{};
  plan.chunk = std::max<int64_t>(kChunkElements / channels, 8);
  plan.chunks = divide_up(pixels, plan.chunk);
  plan.padded = divide_up(channels, 32) * 32;
  plan.scratch_size = (plan.chunks + 1) * 2 * plan.padded;
  plan.threads = omp_get_max_threads();  // PyTorch's number: both share one OpenMP runtime
  return plan;
}

GroupNormSiluPlan plan_for(const GroupNormSiluArgs& args) {
  GroupNormSiluPlan plan = plan_for_shape(args.pixels, args.channels);
  const int64_t elements = args.batch * args.pixels * args.channels;
  const int64_t bytes =
      elements * ((args.residual ? 3 : 1) * bytes_of(args.map_dtype) + bytes_of(args.normalised_dtype));
  const uintptr_t addresses =
      reinterpret_cast<uintptr_t>(args.normalised) | reinterpret_cast<uintptr_t>(args.total);
  plan.stream = bytes >= kStreamBytes && addresses % kCacheLine == 0 && args.channels % 32 == 0;
  return plan;
}

// Memory of the calling thread, which keeps it until it ends, at the largest size that it ever asked for: a call
// that allocated its own would take a page fault for every 4 KiB of it.
double* scratch_of_this_thread(size_t size) {
  static thread_local std::unique_ptr<double[]> scratch;
  static thread_local size_t capacity = 0;
  if (size > capacity) {
    scratch.reset(new double[size]);
    capacity = size;
  }
  return scratch.get();
}

}  // namespace

void launch_group_norm_silu(const GroupNormSiluArgs& args) {
  const int64_t elements = args.batch * args.pixels * args.channels;
  ask_for_huge_pages(args.normalised, elements * bytes_of(args.normalised_dtype));
  if (args.total) ask_for_huge_pages(args.total, elements * bytes_of(args.map_dtype));
  const GroupNormSiluPlan plan = plan_for(args);
  const GroupNormSiluKernel kernel = for_this_cpu([](auto isa) { return group_norm_silu_kernel(isa); });
  kernel(args, plan, scratch_of_this_thread(plan.threads * plan.scratch_size));
}

void launch_group_norm_silu_backward(const GroupNormSiluBackwardArgs& args) {
  ask_for_huge_pages(args.grad_x, args.batch * args.pixels * args.channels * bytes_of(args.map_dtype));
  GroupNormSiluPlan plan = plan_for_shape(args.pixels, args.channels);
  plan.scratch_size = (plan.chunks + 2) * 2 * plan.padded;
  const auto kernel = for_this_cpu([](auto isa) { return group_norm_silu_backward_kernel(isa); });
  kernel(args, plan, scratch_of_this_thread(args.batch * plan.scratch_size));
}

}  // namespace titok
