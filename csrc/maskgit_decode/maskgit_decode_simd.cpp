// Draws one code from one row of logits, compiled once per instruction set.
//
// Inverse transform sampling on integers (titok/ops/maskgit_decode_step.py, step 2). The templates of maskgit_decode.h and
// fixed_math.h run on vectors as wide as the instruction set has. Sums of integers do not depend on their order, so every
// instruction set draws the same code.
#include "maskgit_decode/maskgit_decode_simd.h"

#include "common/float16.h"
#include "common/simd.h"

template <>
struct titok::Lanes<titok::TITOK_ISA::Floats> {
  using Int = TITOK_ISA::Ints;
  static TITOK_HD Int truncate(TITOK_ISA::Floats x) { return __builtin_convertvector(x, TITOK_ISA::Ints); }
  static TITOK_HD TITOK_ISA::Floats convert(TITOK_ISA::Words x) {
    return __builtin_convertvector(bit_cast<TITOK_ISA::Ints>(x), TITOK_ISA::Floats);
  }
};

namespace titok::TITOK_ISA {
namespace {

// Codes whose largest logit and sum of weights are remembered, so that the last search is short.
constexpr int kBlock = 512;
constexpr int kBlocks = kMaxCodes / kBlock;

TITOK_HD Floats load_floats(const float* from) { return read<Floats>(from); }

TITOK_HD Floats load_floats(const BFloat16* from) { return widen(read<Halves>(from)); }

TITOK_HD Floats load_floats(const Float16* from) {
#if defined(TITOK_ISA_AVX512)
  return (Floats)_mm512_maskz_cvtph_ps(0xFFFF, read<__m256i>(from));
#elif defined(TITOK_ISA_AVX2)
  return (Floats)_mm256_cvtph_ps(read<__m128i>(from));
#else
  return widen_float16<Floats>(__builtin_convertvector(read<Halves>(from), Words));
#endif
}

// The finite logits y of a row, a vector at a time. Lanes past the last code are -inf, whose weight is 0.
template <class T, bool kGuided>
class Row {
 public:
  Row(const DecodeRow& row, const DecodeParams& params)
      : cond_(static_cast<const T*>(row.cond)),
        uncond_(static_cast<const T*>(row.uncond)),
        guidance_(params.guidance),
        inverse_temperature_(params.inverse_temperature) {}

  // Calls visit(v, y of codes v ... v + kLanes - 1) over [begin, end); begin is a multiple of kLanes.
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

TITOK_HD int64_t sum_of(Words x) {
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
    Floats most = broadcast(-__builtin_inff());
    row.each(block * kBlock, end_of(block), [&](int, Floats y) { most = y > most ? y : most; });
    const float block_top = largest(most);
    if (block_top > top) {
      top = block_top;
      top_block = block;
    }
  }

  DrawnCode drawn = {-1, top};
  if (params.draw_scale == 0.0f) {  // greedy: the first code with the largest logit
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
    // The 16-bit halves of the weights are summed apart, so that 32-bit lanes do not overflow within a block.
    Words low = {}, high = {};
    row.each(block * kBlock, end_of(block), [&](int, Floats y) {
      const Words weight = weigh(y);
      low += weight & 0xFFFFu;
      high += weight >> 16;
    });
    sums[block] = sum_of(low) + (sum_of(high) << 16);
    total += sums[block];
  }

  // Searches the cumulative weights: first the block, then the vector, then the lane.
  int64_t left = static_cast<int64_t>(scale_uniform(uniform, static_cast<uint64_t>(total)));
  int block = 0;
  while (left >= sums[block]) left -= sums[block++];
  row.each(block * kBlock, end_of(block), [&](int v, Floats y) {
    if (drawn.code >= 0) return;
    const Words weight = weigh(y);
    const int64_t all = sum_of(weight & 0xFFFFu) + (sum_of(weight >> 16) << 16);
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

DrawnCode draw_for_dtype(const DecodeRow& row, const DecodeParams& params, uint64_t uniform) {
  switch (row.dtype) {
    case DType::kBFloat16: return draw<BFloat16>(row, params, uniform);
    case DType::kFloat16: return draw<Float16>(row, params, uniform);
    default: return draw<float>(row, params, uniform);
  }
}

}  // namespace
}  // namespace titok::TITOK_ISA

titok::DrawCode titok::draw_code_kernel(TITOK_ISA::ThisIsa) { return TITOK_ISA::draw_for_dtype; }
