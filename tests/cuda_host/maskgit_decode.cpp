// csrc/maskgit_decode/maskgit_decode_kernel.cuh on the host, as a shared library for
// tests/ops/test_maskgit_decode_cuda_host.py.
#include "cuda_host.h"
//
#include "maskgit_decode/maskgit_decode_kernel.cuh"

using namespace titok;

uint64_t* titok::dynamic_shared() { return cuda_host::block->shared.data(); }

namespace {

template <class T, int kThreads, int kRounds>
void run(const DecodeArgs& args, cuda_host::Order order) {
  cuda_host::run_grid(args.batch * args.length, kThreads, shared_bytes(args), order,
                      [&] { maskgit_decode_kernel<T, kThreads, kRounds>(args); });
}

template <class T>
int run(const DecodeArgs& args, int threads, int rounds, cuda_host::Order order) {
  if (threads == 64 && rounds == 0) return run<T, 64, 0>(args, order), 0;
  if (threads == 64 && rounds == 1) return run<T, 64, 1>(args, order), 0;
  if (threads == 64 && rounds == 3) return run<T, 64, 3>(args, order), 0;
  if (threads == 256 && rounds == 2) return run<T, 256, 2>(args, order), 0;
  return 1;
}

}  // namespace

// Returns 0, or 1 where that block shape is not built.
extern "C" int maskgit_decode_on_host(const DecodeArgs* args, int threads, int rounds, int order) {
  switch (args->dtype) {
    case DType::kFloat32: return run<float>(*args, threads, rounds, cuda_host::Order(order));
    case DType::kBFloat16: return run<BFloat16>(*args, threads, rounds, cuda_host::Order(order));
    default: return run<Float16>(*args, threads, rounds, cuda_host::Order(order));
  }
}
