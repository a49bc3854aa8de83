// The kernels of nearest_codebook for one instruction set (see cpu_isa.h): a register-tiled product of kRows latents
// by kPanels vectors of codes whose results go straight into running minima, lane by lane.
#include <cmath>
#include <cstring>
#include <limits>

#include "float16.h"
#include "nearest_codebook.h"

#if defined(TITOK_ISA_AVX512) || defined(TITOK_ISA_AVX2)
#include <immintrin.h>
#endif

namespace titok {
namespace TITOK_ISA {
namespace {

// Accumulators take most of the registers: 24 of 32 with AVX-512, 12 of 16 with AVX2.
#if defined(TITOK_ISA_AVX512)
constexpr int kLanes = 16, kRows = 8, kPanels = 3;
#elif defined(TITOK_ISA_AVX2)
constexpr int kLanes = 8, kRows = 6, kPanels = 2;
#else
constexpr int kLanes = 4, kRows = 6, kPanels = 2;
#endif
constexpr int kTile = kLanes * kPanels;
static_assert(kRowBlock % kRows == 0, "staged blocks are padded to whole groups of rows");

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNormFloor = 1e-12f;

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// The build forbids the compiler to contract a * b + c, so that the fused product is asked for by name.
inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(TITOK_ISA_AVX512)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(TITOK_ISA_AVX2)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

template <class T>
void widen_row(const T* from, int width, float* to) {
  for (int c = 0; c < width; ++c) to[c] = to_float(from[c]);
}

void read_row(const RowMatrix& m, int64_t row, int width, float* to) {
  const int64_t offset = row * m.stride;
  switch (m.type) {
    case FloatType::kFloat32: return widen_row(static_cast<const float*>(m.data) + offset, width, to);
    case FloatType::kBFloat16: return widen_row(static_cast<const BFloat16*>(m.data) + offset, width, to);
    case FloatType::kFloat16: return widen_row(static_cast<const Float16*>(m.data) + offset, width, to);
  }
}

// Eight sums side by side: the same order of additions on every instruction set, and fast on all.
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

// Reads a row as it is compared, zeros where its sum of squares is not finite; returns whether that is finite.
bool prepare_row(const RowMatrix& m, int64_t row, int width, bool normalize, float* to) {
  read_row(m, row, width, to);
  const float squares = sum_of_squares(to, width);
  if (!(squares < kInfinity)) {
    std::memset(to, 0, width * sizeof(float));
    return false;
  }
  if (normalize) {
    const float norm = std::fmax(std::sqrt(squares), kNormFloor);
    for (int c = 0; c < width; ++c) to[c] /= norm;
  }
  return true;
}

void pack(const RowMatrix& codebook, int width, bool normalize, int64_t first_tile, int64_t tiles, void* scratch,
          float* packed) {
  float* row = static_cast<float*>(scratch);
  for (int64_t t = first_tile; t < first_tile + tiles; ++t) {
    for (int lane = 0; lane < kTile; ++lane) {
      const int64_t code = t * kTile + lane;
      const bool usable = code < codebook.rows && prepare_row(codebook, code, width, normalize, row);
      packed[lane] = usable ? sum_of_squares(row, width) / 2 : kInfinity;
      for (int c = 0; c < width; ++c) packed[(c + 1) * kTile + lane] = usable ? -row[c] : 0.0f;
    }
    packed += static_cast<int64_t>(width + 1) * kTile;
  }
}

// The lowest score that each lane of a row has met, and the first code of the vector where it did.
struct Running {
  Floats score;
  Ints code;
};

// kRows latents against one tile. The scores live in registers only.
inline void search_tile(const float* latents, int width, const float* tile, int32_t first_code, Running* running) {
  Floats scores[kRows][kPanels];
#pragma GCC unroll 8
  for (int p = 0; p < kPanels; ++p) {
    const Floats half_squares = load(tile + p * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) scores[r][p] = half_squares;
  }
  for (int c = 0; c < width; ++c) {
    tile += kTile;
    Floats codes[kPanels];
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) codes[p] = load(tile + p * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Floats value = latents[r * width + c] - Floats{};
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
      const Ints lower = scores[r][p] < score;  // strictly: of equal scores the earliest code stays
      score = lower ? scores[r][p] : score;
      code = lower ? first_code + p * kLanes - Ints{} : code;
    }
    running[r] = {score, code};
  }
}

int64_t scratch_bytes(int width) {
  return kRowBlock * static_cast<int64_t>(sizeof(Running) + (width + 1) * sizeof(float));
}

void search(const RowMatrix& latents, int width, bool normalize, int64_t first_row, int rows, const float* packed,
            int64_t tiles, int64_t first_code, void* scratch, float* scores, int32_t* codes) {
  Running* running = static_cast<Running*>(scratch);
  float* staged = reinterpret_cast<float*>(running + kRowBlock);
  bool finite[kRowBlock];
  const int groups = (rows + kRows - 1) / kRows;
  for (int r = 0; r < groups * kRows; ++r) {
    running[r] = {kInfinity - Floats{}, Ints{}};
    if (r < rows) {
      finite[r] = prepare_row(latents, first_row + r, width, normalize, staged + r * width);
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

}  // namespace

extern const NearestCodebookKernels kNearestCodebook = {kTile, pack, scratch_bytes, search};

}  // namespace TITOK_ISA
}  // namespace titok
