// Nearest codebook row of each latent on the CPU: arguments and entry point.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "common/dtype.h"

namespace titok {

// A (rows, width) matrix of float32, bfloat16 or float16 whose rows are dense.
struct RowMatrix {
  const void* data;
  DType dtype;
  int64_t rows;
  int64_t stride;  // elements from row to row
};

struct NearestCodebookArgs {
  RowMatrix latents;
  RowMatrix codebook;  // at least one row
  int32_t width;       // channels of both, at least 1
  bool normalize;      // divide all rows by their l2 norms first
  int64_t* out;        // (latents.rows), output: index of the nearest codebook row
};

void launch_nearest_codebook(const NearestCodebookArgs& args);

// A thread walks over the codebook with a block of at most this many latents, which stay in its second-level cache.
constexpr int kRowBlock = 96;

// One instruction set's kernels.
//
// A tile of the packed codebook holds `tile` codes e, (width + 1) * tile floats. Codes that must never be chosen, such as
// the padding of the last tile, have the half square inf:
//
//   |e|^2 / 2 of each code
//   -e[0] of each code
//   ...
//   -e[width - 1] of each code
struct NearestCodebookKernels {
  int tile;
  // Packs tiles [first_tile, first_tile + tiles).
  void (*pack)(const NearestCodebookArgs& args, int64_t first_tile, int64_t tiles, float* packed);
  // Bytes that `search` needs for one thread.
  int64_t (*scratch_bytes)(int width);
  // Compares latents [first_row, first_row + rows), at most kRowBlock, with `tiles` packed tiles that begin at code
  // `first_code`. For each latent z: the lowest score |e|^2 / 2 - z.e and the lowest code that has it; (inf, 0) if no
  // code may be chosen; (-inf, 0) if the latent's sum of squares is not finite. `scratch` is aligned to a cache line.
  void (*search)(const NearestCodebookArgs& args, int64_t first_row, int rows, const float* packed, int64_t tiles,
                 int64_t first_code, void* scratch, float* scores, int32_t* codes);
};
const NearestCodebookKernels& nearest_codebook_kernels(Generic);
const NearestCodebookKernels& nearest_codebook_kernels(Avx2);
const NearestCodebookKernels& nearest_codebook_kernels(Avx512);

}  // namespace titok
