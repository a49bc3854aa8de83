// The kernels of nearest_codebook, compiled once per instruction set.
//
// The nearest code minimises |e|^2 / 2 - z.e, because |z - e|^2 = |z|^2 + 2 (|e|^2 / 2 - z.e). A matrix product in register
// tiles of kRows latents by kPanels vectors of codes computes these scores, and they go straight into running minima,
// lane by lane: the matrix of distances is never stored.
#include "nearest_codebook/nearest_codebook.h"

#include "common/float16.h"
#include "common/simd.h"

namespace titok::TITOK_ISA {
namespace {

// Sums take most of the registers: 24 of 32 with AVX-512, 12 of 16 with AVX2.
#if defined(TITOK_ISA_AVX512)
constexpr int kRows = 8, kPanels = 3;
#else
constexpr int kRows = 6, kPanels = 2;
#endif
constexpr int kTile = kLanes * kPanels;
static_assert(kRowBlock % kRows == 0, "staged blocks are padded to whole groups of rows");

constexpr float kInfinity = __builtin_inff();
constexpr float kNormFloor = 1e-12f;  // a smaller norm counts as this

inline Floats square_root(Floats x) {
#if defined(TITOK_ISA_AVX512)
  return (Floats)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);  // GCC 12 warns of the plain form
#elif defined(TITOK_ISA_AVX2)
  return (Floats)_mm256_sqrt_ps((__m256)x);
#else
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
  return x;
#endif
}

// Reads a row as float32 and writes its channels `step` floats apart.
template <class T>
void widen_row(const RowMatrix& m, int64_t row, int width, int step, float* to) {
  const T* from = static_cast<const T*>(m.data) + row * m.stride;
  for (int c = 0; c < width; ++c) to[c * step] = to_float(from[c]);
}

void read_row(const RowMatrix& m, int64_t row, int width, int step, float* to) {
  switch (m.dtype) {
    case DType::kBFloat16: return widen_row<BFloat16>(m, row, width, step, to);
    case DType::kFloat16: return widen_row<Float16>(m, row, width, step, to);
    default: return widen_row<float>(m, row, width, step, to);
  }
}

// Eight sums side by side: fast, and the same order of additions on every instruction set.
float sum_of_squares(const float* x, int width) {
  float sums[8] = {};
  int c = 0;
  for (; c + 8 <= width; c += 8) {
    for (int k = 0; k < 8; ++k) sums[k] += x[c + k] * x[c + k];
  }
  for (int k = 0; c < width; ++c, ++k) sums[k] += x[c] * x[c];
  for (int half = 4; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
  }
  return sums[0];
}

// Reads a latent as it is compared, and returns whether its sum of squares is finite. If not, it reads zeros.
bool prepare_latent(const NearestCodebookArgs& args, int64_t row, float* to) {
  const int width = args.width;
  read_row(args.latents, row, width, 1, to);
  const float squares = sum_of_squares(to, width);
  if (!(squares < kInfinity)) {
    std::memset(to, 0, width * sizeof(float));
    return false;
  }
  if (args.normalize) {
    const float norm = __builtin_sqrtf(squares);
    const float scale = 1 / (norm > kNormFloor ? norm : kNormFloor);
    for (int c = 0; c < width; ++c) to[c] *= scale;
  }
  return true;
}

void pack(const NearestCodebookArgs& args, int64_t first_tile, int64_t tiles, float* packed) {
  const int width = args.width;
  const int64_t tile_floats = static_cast<int64_t>(width + 1) * kTile;
  for (int64_t t = first_tile; t < first_tile + tiles; ++t, packed += tile_floats) {
    const int64_t left = args.codebook.rows - t * kTile;
    const int codes = static_cast<int>(left < kTile ? left : kTile);
    if (codes < kTile) {
      for (int64_t i = 0; i < tile_floats; ++i) packed[i] = kInfinity;
    }
    for (int lane = 0; lane < codes; ++lane) {
      read_row(args.codebook, t * kTile + lane, width, kTile, packed + kTile + lane);
    }
    for (int p = 0; p < kPanels; ++p) {
      float* const half_squares = packed + p * kLanes;
      Floats squares = {};
      for (int c = 1; c <= width; ++c) {
        const Floats x = read<Floats>(half_squares + c * kTile);
        squares = fma(x, x, squares);
      }
      const Ints usable = squares < kInfinity;  // false for NaN and for the padding
      Floats scale = broadcast(-1.0f);
      if (args.normalize) {
        const Floats norm = square_root(squares);
        scale /= norm > kNormFloor ? norm : broadcast(kNormFloor);
      }
      Floats scaled_squares = {};
      for (int c = 1; c <= width; ++c) {
        const Floats x = usable ? read<Floats>(half_squares + c * kTile) * scale : Floats{};
        scaled_squares = fma(x, x, scaled_squares);
        write(half_squares + c * kTile, x);
      }
      write(half_squares, usable ? scaled_squares / 2 : broadcast(kInfinity));
    }
  }
}

// For each lane the lowest score that a latent has met, and the first code of the vector where it did.
struct Running {
  Floats score;
  Ints code;
};

// Compares kRows latents with one tile. The scores live in registers only.
inline void search_tile(const float* latents, int width, const float* tile, int32_t first_code, Running* running) {
  Floats scores[kRows][kPanels];
#pragma GCC unroll 8
  for (int p = 0; p < kPanels; ++p) {
    const Floats half_squares = read<Floats>(tile + p * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) scores[r][p] = half_squares;
  }
  for (int c = 0; c < width; ++c) {
    tile += kTile;
    Floats codes[kPanels];
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) codes[p] = read<Floats>(tile + p * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Floats value = broadcast(latents[r * width + c]);
#pragma GCC unroll 8
      for (int p = 0; p < kPanels; ++p) scores[r][p] = fma(value, codes[p], scores[r][p]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    Floats score = running[r].score;
    Ints code = running[r].code;
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) {
      const Ints lower = scores[r][p] < score;  // strictly, so that the first of equal scores stays
      score = lower ? scores[r][p] : score;
      code = lower ? first_code + p * kLanes - Ints{} : code;
    }
    running[r] = {score, code};
  }
}

int64_t scratch_bytes(int width) {
  return kRowBlock * static_cast<int64_t>(sizeof(Running) + (width + 1) * sizeof(float));
}

void search(const NearestCodebookArgs& args, int64_t first_row, int rows, const float* packed, int64_t tiles,
            int64_t first_code, void* scratch, float* scores, int32_t* codes) {
  const int width = args.width;
  Running* running = static_cast<Running*>(scratch);               // (kRowBlock)
  float* staged = reinterpret_cast<float*>(running + kRowBlock);  // (kRowBlock, width)
  bool finite[kRowBlock];
  const int groups = (rows + kRows - 1) / kRows;
  for (int r = 0; r < groups * kRows; ++r) {
    running[r] = {broadcast(kInfinity), Ints{}};
    if (r < rows) {
      finite[r] = prepare_latent(args, first_row + r, staged + r * width);
    } else {
      std::memset(staged + r * width, 0, width * sizeof(float));
    }
  }
  for (int64_t t = 0; t < tiles; ++t) {
    for (int g = 0; g < groups; ++g) {
      search_tile(staged + g * kRows * width, width, packed, static_cast<int32_t>(first_code + t * kTile),
                  running + g * kRows);
    }
    packed += static_cast<int64_t>(width + 1) * kTile;
  }
  for (int r = 0; r < rows; ++r) {
    float best = finite[r] ? kInfinity : -kInfinity;
    int32_t code = 0;
    for (int lane = 0; finite[r] && lane < kLanes; ++lane) {
      const float score = running[r].score[lane];
      const int32_t candidate = running[r].code[lane] + lane;
      if (score < best || (score == best && score < kInfinity && candidate < code)) {
        best = score;
        code = candidate;
      }
    }
    scores[r] = best;
    codes[r] = code;
  }
}

constexpr NearestCodebookKernels kKernels = {kTile, pack, scratch_bytes, search};

}  // namespace
}  // namespace titok::TITOK_ISA

const titok::NearestCodebookKernels& titok::nearest_codebook_kernels(TITOK_ISA::ThisIsa) { return TITOK_ISA::kKernels; }
