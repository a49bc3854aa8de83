// Shares the outputs of int8_linear among threads.
//
// Rows pass in chunks, whose quantised values stay in the caches while all weights are read. Within a chunk, a thread
// takes whole panels of outputs, or where there are few panels also part of the rows.
#include "int8_linear/int8_linear.h"

#include "common/threads.h"

namespace titok {
namespace {

constexpr int64_t kChunkRows = 1152;            // at most
constexpr double kProductsPerThread = 1 << 20;  // fewer multiplications take less time than waking a thread
constexpr int64_t kLeastRows = 48;              // of a piece, so that reading the weights costs little

const Int8LinearKernels& kernels_for_this_cpu() {
#if defined(__x86_64__)
  if (cpu_multiplies_int8()) return int8_linear_kernels(Avx512Vnni{});
#endif
  return for_this_cpu([](auto isa) -> const Int8LinearKernels& { return int8_linear_kernels(isa); });
}

}  // namespace

void launch_int8_linear(const Int8LinearArgs& args) {
  const Int8LinearKernels& kernels = kernels_for_this_cpu();
  const int64_t panels = int8_panels(args.outputs), chunk = std::min(args.rows, kChunkRows);
  const int threads =
      threads_for(static_cast<double>(args.rows) * args.inputs * args.outputs, kProductsPerThread);
  const int64_t pieces =
      panels >= 4 * threads ? 1 : std::clamp<int64_t>(chunk / kLeastRows, 1, divide_up(4 * threads, panels));

  const AlignedBuffer values = allocate_aligned(chunk * args.inputs);
  const std::unique_ptr<float[]> numbers(new float[2 * chunk]);
  const Int8Rows rows{reinterpret_cast<uint8_t*>(values.get()), numbers.get(), numbers.get() + chunk};
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    for (int64_t first = 0; first < args.rows; first += chunk) {
      const int64_t here = std::min(chunk, args.rows - first), items = panels * pieces;
      kernels.quantize(args, first, here * thread / team, here * (thread + 1) / team, rows);
#pragma omp barrier
      for (int64_t item = items * thread / team; item < items * (thread + 1) / team; ++item) {
        const int64_t piece = item % pieces;
        kernels.multiply(args, first, here * piece / pieces, here * (piece + 1) / pieces, item / pieces, rows);
      }
#pragma omp barrier
    }
  }
}

}  // namespace titok
