// Nearest codebook row of each latent on the CPU: what nearest_codebook.cpp asks of nearest_codebook_simd.cpp.
#pragma once

#include <cstdint>

namespace titok {

enum class FloatType { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A (rows, width) matrix, consecutive within a row.
struct RowMatrix {
  const void* data;
  FloatType type;
  int64_t rows;
  int64_t stride;  // elements from row to row
};

// Latents in blocks of at most this many rows stay in L2 while a thread walks over the codebook.
constexpr int kRowBlock = 96;

// One instruction set's kernels.
struct NearestCodebookKernels {
  // Codes are packed in tiles of so many: for each the half of its squared norm (infinite where it must not win,
  // as in the last tile's padding), then for each channel the tile's values, negated.
  int tile;
  void (*pack)(const RowMatrix& codebook, int width, bool normalize, int64_t first_tile, int64_t tiles, float* packed);
  int64_t (*scratch_bytes)(int width);  // of a thread that searches, aligned to 64
  // Latents [first_row, first_row + rows), at most kRowBlock, against packed tiles that begin at code `first_code`.
  // For each the lowest score |e|^2 / 2 - z.e and the lowest code that has it; (inf, 0) if no code may win;
  // (-inf, 0) if the latent's sum of squares is not finite.
  void (*search)(const RowMatrix& latents, int width, bool normalize, int64_t first_row, int rows, const float* packed,
                 int64_t tiles, int64_t first_code, void* scratch, float* scores, int32_t* codes);
};

namespace generic { extern const NearestCodebookKernels kNearestCodebook; }
namespace avx2 { extern const NearestCodebookKernels kNearestCodebook; }
namespace avx512 { extern const NearestCodebookKernels kNearestCodebook; }

void launch_nearest_codebook(const RowMatrix& latents, const RowMatrix& codebook, int width, bool normalize, int64_t* out);

}  // namespace titok
