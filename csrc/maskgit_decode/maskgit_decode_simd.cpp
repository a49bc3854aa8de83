// Draws one code from one row of logits. Compiled once per instruction set: GCC's vector extensions make the shared
// templates run on as many lanes as the set has, and integer sums make the order of the lanes irrelevant.
#include "maskgit_decode/maskgit_decode_simd.h"

#include "common/float16.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(TITOK_ISA_AVX512)
#define TITOK_LANES 16
#elif defined(TITOK_ISA_AVX2)
#define TITOK_LANES 8
#else
#define TITOK_LANES 4
#endif

namespace titok {

typedef float Floats __attribute__((vector_size(TITOK_LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(TITOK_LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(TITOK_LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(TITOK_LANES * 2)));

template <>
struct Lanes<Floats> {
  using Int = Ints;
  static TITOK_HD Int truncate(Floats x) { return __builtin_convertvector(x, Ints); }
  static TITOK_HD Floats convert(Words x) { return __builtin_convertvector(bit_cast<Ints>(x), Floats); }
};

namespace TITOK_ISA {
namespace {

constexpr int kLanes = TITOK_LANES;
constexpr int kBlock = 512;  // codes whose maximum and sum are remembered, so that the last search stays short
constexpr int kBlocks = kMaxCodes / kBlock;

template <class To>
TITOK_HD To load(const void* from) {
  To to;
  memcpy(&to, from, sizeof(to));
  return to;
}

TITOK_HD Floats load_floats(const float* from) { return load<Floats>(from); }

TITOK_HD Floats load_floats(const BFloat16* from) {
  return bit_cast<Floats>(__builtin_convertvector(load<Halves>(from), Words) << 16);
}

TITOK_HD Floats load_floats(const Float16* from) {
#if defined(TITOK_ISA_AVX512)
  return _mm512_maskz_cvtph_ps(0xFFFF, load<__m256i>(from));
#elif defined(TITOK_ISA_AVX2)
  return _mm256_cvtph_ps(load<__m128i>(from));
#else
  return widen_float16<Floats>(__builtin_convertvector(load<Halves>(from), Words));
#endif
}

// The finite logits y of a row, a vector at a time; lanes past the last code are -inf, which weighs nothing.
template <class T, bool kGuided>
class Row {
 public:
  Row(const DecodeRow& row, const DecodeParams& params)
      : cond_(static_cast<const T*>(row.cond)),
        uncond_(static_cast<const T*>(row.uncond)),
        guidance_(params.guidance),
        inverse_temperature_(params.inverse_temperature) {}

  // Calls visit(v, y of codes v ...) over [begin, end), begin a multiple of kLanes.
  template <class Visit>
  TITOK_HD void each(int begin, int end, Visit visit) const {
    int v = begin;
    for (; v + kLanes <= end; v += kLanes) visit(v, logits(cond_ + v, uncond_ + (kGuided ? v : 0)));
    if (v < end) visit(v, tail(v, end - v));
  }

 private:
  TITOK_HD Floats logits(const T* cond, const T* uncond) const {
    Floats y = load_floats(cond);
    if (kGuided) y = guide(y, load_floats(uncond), guidance_);
    return finite_logit(y, inverse_temperature_);
  }

  __attribute__((noinline)) Floats tail(int v, int count) const {
    T cond[kLanes] = {}, uncond[kLanes] = {};
    for (int i = 0; i < count; ++i) {
      cond[i] = cond_[v + i];
      if (kGuided) uncond[i] = uncond_[v + i];
    }
    Floats y = logits(cond, uncond);
    for (int i = count; i < kLanes; ++i) y[i] = -__builtin_inff();
    return y;
  }

  const T* cond_;
  const T* uncond_;
  float guidance_, inverse_temperature_;
};

TITOK_HD float largest(Floats x) {
  float top = x[0];
  for (int i = 1; i < kLanes; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

TITOK_HD int64_t sum(Words x) {
  int64_t total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

template <class T, bool kGuided>
DrawnCode draw(const DecodeRow& in, const DecodeParams& params, uint64_t uniform) {
  const Row<T, kGuided> row(in, params);
  const auto end_of = [&](int block) { return block * kBlock + kBlock < in.codes ? block * kBlock + kBlock : in.codes; };
  const int blocks = (in.codes + kBlock - 1) / kBlock;
  if (blocks < 1) __builtin_unreachable();

  float top = -__builtin_inff();
  int top_block = 0;
  for (int block = 0; block < blocks; ++block) {
    Floats most = Floats{} - __builtin_inff();
    row.each(block * kBlock, end_of(block), [&](int, Floats y) { most = y > most ? y : most; });
    const float block_top = largest(most);
    if (block_top > top) {
      top = block_top;
      top_block = block;
    }
  }

  DrawnCode drawn = {-1, top};
  if (params.draw_scale == 0.0f) {
    row.each(top_block * kBlock, end_of(top_block), [&](int v, Floats y) {
      for (int i = 0; i < kLanes && drawn.code < 0; ++i) {
        if (y[i] == top) drawn.code = v + i;
      }
    });
    return drawn;
  }

  const auto weigh = [&](Floats y) { return bit_cast<Words>(exp_weight((y - top) * params.draw_scale)); };
  int64_t sums[kBlocks], total = 0;
  for (int block = 0; block < blocks; ++block) {
    // 32-bit lanes hold the sums of the 16-bit halves of a block's weights.
    Words low = {}, high = {};
    row.each(block * kBlock, end_of(block), [&](int, Floats y) {
      const Words weight = weigh(y);
      low += weight & 0xFFFFu;
      high += weight >> 16;
    });
    sums[block] = sum(low) + (sum(high) << 16);
    total += sums[block];
  }

  int64_t left = static_cast<int64_t>(scale_uniform(uniform, static_cast<uint64_t>(total)));
  int block = 0;
  while (left >= sums[block]) left -= sums[block++];
  row.each(block * kBlock, end_of(block), [&](int v, Floats y) {
    if (drawn.code >= 0) return;
    const Words weight = weigh(y);
    const int64_t all = sum(weight & 0xFFFFu) + (sum(weight >> 16) << 16);
    if (left >= all) {
      left -= all;
      return;
    }
    int i = 0;
    while (left >= static_cast<int64_t>(weight[i])) left -= weight[i++];
    drawn = {v + i, in.maskgit ? log_probability((y[i] - top) * params.draw_scale, static_cast<uint64_t>(total)) : y[i]};
  });
  return drawn;
}

template <class T>
DrawnCode draw(const DecodeRow& row, const DecodeParams& params, uint64_t uniform) {
  return row.uncond != nullptr && params.guidance != 1.0f ? draw<T, true>(row, params, uniform)
                                                          : draw<T, false>(row, params, uniform);
}

}  // namespace

DrawnCode draw_code(const DecodeRow& row, const DecodeParams& params, uint64_t uniform) {
  switch (row.type) {
    case LogitType::kFloat32: return draw<float>(row, params, uniform);
    case LogitType::kBFloat16: return draw<BFloat16>(row, params, uniform);
    default: return draw<Float16>(row, params, uniform);
  }
}

}  // namespace TITOK_ISA
}  // namespace titok
