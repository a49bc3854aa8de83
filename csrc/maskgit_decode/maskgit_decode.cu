// Launches the MaskGIT decode step on the GPU.
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
cudaError_t launch_maskgit_decode(const DecodeArgs& args, cudaStream_t stream) {
  const int64_t blocks = int64_t{args.batch} * args.length;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX || args.length > kMaxTokens || args.codes < 1 || args.codes > kMaxCodes) {
    return cudaErrorInvalidValue;
  }
  switch (args.type) {
    case LogitType::kFloat32: launch<float>(args, stream); break;
    case LogitType::kBFloat16: launch<BFloat16>(args, stream); break;
    case LogitType::kFloat16: launch<Float16>(args, stream); break;
  }
  return cudaGetLastError();
}

const char* maskgit_decode_cuda(const DecodeArgs& args, void* stream) {
  const cudaError_t error = launch_maskgit_decode(args, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace titok
