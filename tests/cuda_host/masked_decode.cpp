// csrc/masked_decode/masked_decode_kernel.cuh on the host, with the launches of masked_decode.cu, as a shared library for
// tests/ops/test_masked_decode_cuda_host.py.
#include "cuda_host.h"
//
#include "masked_decode/masked_decode_kernel.cuh"

using namespace titok;

namespace {

constexpr int kThreads = 64;

template <class T>
void run(const GpuDecodeArgs& args, cuda_host::Order order) {
  const unsigned rows = args.step.batch, positions = rows * args.step.length, blocks = positions * args.chunks;
  const auto run_grid = [&](unsigned grid, const std::function<void()>& body) {
    cuda_host::run_grid(grid, kThreads, args.step.length * sizeof(uint64_t), order, body);
  };
  run_grid(rows, [&] { masked_decode_candidates_kernel<kThreads>(args); });
  run_grid(blocks, [&] { masked_decode_stage_kernel<T, Stage::kPeak, kThreads>(args, 0); });
  for (int shift = 32 - kDigitBits; args.truncates && shift >= 0; shift -= kDigitBits) {
    run_grid(blocks, [&] { masked_decode_stage_kernel<T, Stage::kCount, kThreads>(args, shift); });
  }
  for (int shift = 32 - kDigitBits; args.truncates && shift >= 0; shift -= kDigitBits) {
    run_grid(blocks, [&] { masked_decode_stage_kernel<T, Stage::kMass, kThreads>(args, shift); });
  }
  run_grid(blocks, [&] { masked_decode_stage_kernel<T, Stage::kSums, kThreads>(args, 0); });
  run_grid(positions, [&] { masked_decode_find_kernel<T, kThreads>(args); });
  run_grid(rows, [&] { masked_decode_accept_kernel<kThreads>(args); });
}

}  // namespace

extern "C" void masked_decode_on_host(GpuDecodeArgs* args, int order) {
  args->needs = needs_of(args->step);
  args->chunks = (args->step.codes + args->chunk - 1) / args->chunk;
  switch (args->step.dtype) {
    case DType::kFloat32: return run<float>(*args, cuda_host::Order(order));
    case DType::kBFloat16: return run<BFloat16>(*args, cuda_host::Order(order));
    default: return run<Float16>(*args, cuda_host::Order(order));
  }
}
