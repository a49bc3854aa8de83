// Shares the search of nearest_codebook among threads.
//
// The codebook is packed chunk by chunk, and blocks of latents are searched in each chunk. With few blocks the codes of a
// chunk are divided among threads as well. Results are merged in the order of the codes, so that of equal distances the
// lowest index wins, whatever the number of threads.
#include "nearest_codebook/nearest_codebook.h"

#include <limits>
#include <vector>

#include "common/threads.h"

namespace titok {
namespace {

// Packed codes of a chunk: 4 MiB, which every core reads again for each block of latents.
constexpr int64_t kChunkFloats = 1 << 20;
constexpr double kProductsPerThread = 1 << 17;  // fewer multiplications take less time than waking a thread

}  // namespace

void launch_nearest_codebook(const NearestCodebookArgs& args) {
  const NearestCodebookKernels& kernels =
      for_this_cpu([](auto isa) -> const NearestCodebookKernels& { return nearest_codebook_kernels(isa); });
  const int64_t rows = args.latents.rows, tile_floats = static_cast<int64_t>(args.width + 1) * kernels.tile;
  const int64_t tiles = divide_up(args.codebook.rows, kernels.tile);
  const int64_t chunk_tiles = std::clamp<int64_t>(kChunkFloats / tile_floats, 1, tiles);
  const int64_t blocks = divide_up(rows, kRowBlock);

  const int threads = threads_for(static_cast<double>(rows) * args.codebook.rows * args.width, kProductsPerThread);
  // Pieces that a chunk's codes are divided into: one where there are enough blocks for all threads.
  const int64_t pieces =
      blocks >= 4 * threads || threads == 1 ? 1 : std::min(chunk_tiles, divide_up(4 * threads, blocks));
  const bool direct = pieces == 1 && chunk_tiles == tiles;  // a single search finds a latent's code

  const AlignedBuffer packed = allocate_aligned(chunk_tiles * tile_floats * sizeof(float));
  const int64_t scratch_bytes = divide_up(kernels.scratch_bytes(args.width), kCacheLine) * kCacheLine;
  const AlignedBuffer scratch = allocate_aligned(threads * scratch_bytes);
  std::vector<float> best(direct ? 0 : rows, std::numeric_limits<float>::infinity());  // lowest score so far
  std::vector<float> piece_scores(pieces == 1 ? 0 : pieces * rows);                    // (pieces, rows)
  std::vector<int32_t> piece_codes(pieces == 1 ? 0 : pieces * rows);                   // (pieces, rows)
  if (!direct) std::fill(args.out, args.out + rows, 0);

#pragma omp parallel num_threads(threads)
  {
    void* const own_scratch = scratch.get() + omp_get_thread_num() * scratch_bytes;
    float* const packed_codes = reinterpret_cast<float*>(packed.get());
    float scores[kRowBlock];
    int32_t codes[kRowBlock];
    for (int64_t chunk = 0; chunk < tiles; chunk += chunk_tiles) {
      const int64_t here = std::min(chunk_tiles, tiles - chunk);
#pragma omp for schedule(static)
      for (int64_t t = 0; t < here; ++t) kernels.pack(args, chunk + t, 1, packed_codes + t * tile_floats);
#pragma omp for schedule(dynamic)
      for (int64_t item = 0; item < blocks * pieces; ++item) {
        const int64_t piece = item % pieces, row = item / pieces * kRowBlock;
        const int64_t from = here * piece / pieces, to = here * (piece + 1) / pieces;
        const int count = static_cast<int>(std::min<int64_t>(kRowBlock, rows - row));
        float* const item_scores = pieces > 1 ? piece_scores.data() + piece * rows + row : scores;
        int32_t* const item_codes = pieces > 1 ? piece_codes.data() + piece * rows + row : codes;
        kernels.search(args, row, count, packed_codes + from * tile_floats, to - from, (chunk + from) * kernels.tile,
                       own_scratch, item_scores, item_codes);
        if (pieces > 1) continue;
        for (int r = 0; r < count; ++r) {
          if (direct || scores[r] < best[row + r]) args.out[row + r] = codes[r];
          if (!direct) best[row + r] = std::min(best[row + r], scores[r]);
        }
      }
      if (pieces > 1) {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t piece = 0; piece < pieces; ++piece) {
            if (!(piece_scores[piece * rows + r] < best[r])) continue;
            best[r] = piece_scores[piece * rows + r];
            args.out[r] = piece_codes[piece * rows + r];
          }
        }
      }
    }
  }
}

}  // namespace titok
