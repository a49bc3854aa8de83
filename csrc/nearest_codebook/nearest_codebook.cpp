// nearest_codebook on the CPU: packs the codebook chunk by chunk, shares latents (or, where those are few, codes)
// among threads, and merges what they found in the order of the codes, so that ties go to the lowest index.
#include "nearest_codebook/nearest_codebook.h"

#include <omp.h>

#include <algorithm>
#include <cstddef>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "common/cpu_isa.h"

namespace titok {
namespace {

// Packed codes at a time: 4 MiB, which every core reads again for each block of latents.
constexpr int64_t kChunkFloats = 1 << 20;
// Multiplications that are worth waking another thread for, and worth an item of their own.
constexpr int64_t kWorkPerThread = 1 << 17;

const NearestCodebookKernels& kernels() {
  switch (cpu_isa()) {
#if defined(__x86_64__)
    case CpuIsa::kAvx512: return avx512::kNearestCodebook;
    case CpuIsa::kAvx2: return avx2::kNearestCodebook;
#endif
    default: return generic::kNearestCodebook;
  }
}

struct Aligned {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};
using Buffer = std::unique_ptr<std::byte, Aligned>;
Buffer allocate(int64_t bytes) { return Buffer(static_cast<std::byte*>(::operator new(bytes, std::align_val_t{64}))); }

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

void launch_nearest_codebook(const RowMatrix& latents, const RowMatrix& codebook, int width, bool normalize, int64_t* out) {
  const NearestCodebookKernels& kernel = kernels();
  const int64_t rows = latents.rows, tile_floats = static_cast<int64_t>(width + 1) * kernel.tile;
  const int64_t tiles = divide_up(codebook.rows, kernel.tile);
  const int64_t chunk_tiles = std::clamp<int64_t>(kChunkFloats / tile_floats, 1, tiles);
  const int64_t blocks = divide_up(rows, kRowBlock);

  const double work = static_cast<double>(rows) * codebook.rows * width;
  const int threads = static_cast<int>(std::clamp<double>(work / kWorkPerThread, 1, omp_get_max_threads()));
  // One thread walks whole blocks of latents; too few of these for all threads, and each is searched in pieces.
  const int64_t pieces =
      blocks >= 4 * threads || threads == 1 ? 1 : std::min(chunk_tiles, divide_up(4 * threads, blocks));
  const bool direct = pieces == 1 && chunk_tiles == tiles;

  const Buffer packed = allocate(chunk_tiles * tile_floats * sizeof(float));
  const int64_t scratch_bytes = divide_up(kernel.scratch_bytes(width), 64) * 64;
  const Buffer scratch = allocate(threads * scratch_bytes);
  std::vector<float> best(direct ? 0 : rows, std::numeric_limits<float>::infinity());
  std::vector<float> piece_scores(pieces == 1 ? 0 : pieces * rows);
  std::vector<int32_t> piece_codes(pieces == 1 ? 0 : pieces * rows);
  if (!direct) std::fill(out, out + rows, 0);

#pragma omp parallel num_threads(threads)
  {
    void* const mine = scratch.get() + omp_get_thread_num() * scratch_bytes;
    float* const codes_packed = reinterpret_cast<float*>(packed.get());
    float scores[kRowBlock];
    int32_t codes[kRowBlock];
    for (int64_t chunk = 0; chunk < tiles; chunk += chunk_tiles) {
      const int64_t here = std::min(chunk_tiles, tiles - chunk);
#pragma omp for schedule(static)
      for (int64_t t = 0; t < here; ++t) {
        kernel.pack(codebook, width, normalize, chunk + t, 1, codes_packed + t * tile_floats);
      }
#pragma omp for schedule(dynamic)
      for (int64_t item = 0; item < blocks * pieces; ++item) {
        const int64_t piece = item % pieces, row = item / pieces * kRowBlock;
        const int64_t from = here * piece / pieces, to = here * (piece + 1) / pieces;
        const int count = static_cast<int>(std::min<int64_t>(kRowBlock, rows - row));
        const bool split = pieces > 1;
        float* const item_scores = split ? piece_scores.data() + piece * rows + row : scores;
        int32_t* const item_codes = split ? piece_codes.data() + piece * rows + row : codes;
        kernel.search(latents, width, normalize, row, count, codes_packed + from * tile_floats, to - from,
                      (chunk + from) * kernel.tile, mine, item_scores, item_codes);
        if (split) continue;
        for (int r = 0; r < count; ++r) {
          if (direct || scores[r] < best[row + r]) out[row + r] = codes[r];
          if (!direct) best[row + r] = std::min(best[row + r], scores[r]);
        }
      }
      if (pieces > 1) {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t piece = 0; piece < pieces; ++piece) {
            if (!(piece_scores[piece * rows + r] < best[r])) continue;
            best[r] = piece_scores[piece * rows + r];
            out[r] = piece_codes[piece * rows + r];
          }
        }
      }
    }
  }
}

}  // namespace titok
