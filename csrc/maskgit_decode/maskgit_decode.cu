// Launches one step of MaskGIT's decoding on the GPU.
#include <cuda_runtime.h>

#include <climits>

#include "maskgit_decode/maskgit_decode_kernel.cuh"

namespace titok {
namespace {

template <class T, int kThreads, int kRounds>
void launch(const DecodeArgs& args, cudaStream_t stream) {
  maskgit_decode_kernel<T, kThreads, kRounds>
      <<<args.batch * args.length, kThreads, shared_bytes(args), stream>>>(args);
}

// Rows of up to 8,192 codes stay in registers.
template <class T>
void launch(const DecodeArgs& args, cudaStream_t stream) {
  if (args.codes <= 1024) return launch<T, 128, 1>(args, stream);
  if (args.codes <= 4096) return launch<T, 256, 2>(args, stream);
  if (args.codes <= 8192) return launch<T, 512, 2>(args, stream);
  return launch<T, 512, 0>(args, stream);
}

}  // namespace

// One launch, no allocation, no synchronisation: fit for capture into a CUDA graph.
const char* launch_maskgit_decode_cuda(const DecodeArgs& args, void* cuda_stream) {
  const cudaStream_t stream = static_cast<cudaStream_t>(cuda_stream);
  const int64_t blocks = int64_t{args.batch} * args.length;
  if (blocks == 0) return nullptr;
  if (blocks > INT_MAX || args.length > kMaxTokens || args.codes < 1 || args.codes > kMaxCodes) {
    return cudaGetErrorString(cudaErrorInvalidValue);
  }
  switch (args.dtype) {
    case DType::kFloat32: launch<float>(args, stream); break;
    case DType::kBFloat16: launch<BFloat16>(args, stream); break;
    case DType::kFloat16: launch<Float16>(args, stream); break;
    default: return cudaGetErrorString(cudaErrorInvalidValue);
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace titok
