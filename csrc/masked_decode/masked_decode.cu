// Launches one decode step of a masked or uniform-state generator on the GPU.
#include <cuda_runtime.h>

#include <climits>

#include "masked_decode/masked_decode_kernel.cuh"

namespace titok {
namespace {

constexpr int kThreads = 256;

template <class T>
void launch(const GpuDecodeArgs& args, cudaStream_t stream) {
  const unsigned rows = args.step.batch, positions = rows * args.step.length, blocks = positions * args.chunks;
  masked_decode_candidates_kernel<kThreads><<<rows, kThreads, 0, stream>>>(args);
  masked_decode_stage_kernel<T, Stage::kPeak, kThreads><<<blocks, kThreads, 0, stream>>>(args, 0);
  for (int shift = 32 - kDigitBits; args.truncates && shift >= 0; shift -= kDigitBits) {
    masked_decode_stage_kernel<T, Stage::kCount, kThreads><<<blocks, kThreads, 0, stream>>>(args, shift);
  }
  for (int shift = 32 - kDigitBits; args.truncates && shift >= 0; shift -= kDigitBits) {
    masked_decode_stage_kernel<T, Stage::kMass, kThreads><<<blocks, kThreads, 0, stream>>>(args, shift);
  }
  masked_decode_stage_kernel<T, Stage::kSums, kThreads><<<blocks, kThreads, 0, stream>>>(args, 0);
  masked_decode_find_kernel<T, kThreads><<<positions, kThreads, 0, stream>>>(args);
  masked_decode_accept_kernel<kThreads><<<rows, kThreads, args.step.length * sizeof(uint64_t), stream>>>(args);
}

}  // namespace

// No allocation, no synchronisation: fit for capture into a CUDA graph.
const char* launch_masked_decode_cuda(const GpuDecodeArgs& args, void* cuda_stream) {
  const cudaStream_t stream = static_cast<cudaStream_t>(cuda_stream);
  if (int64_t{args.step.batch} * args.step.length * args.chunks > INT_MAX) {
    return cudaGetErrorString(cudaErrorInvalidValue);
  }
  switch (args.step.dtype) {
    case DType::kFloat32: launch<float>(args, stream); break;
    case DType::kBFloat16: launch<BFloat16>(args, stream); break;
    case DType::kFloat16: launch<Float16>(args, stream); break;
    default: return cudaGetErrorString(cudaErrorInvalidValue);
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace titok
