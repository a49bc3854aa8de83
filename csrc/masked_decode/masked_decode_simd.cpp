// Draws one code from one row of logits, compiled once per instruction set.
//
// All sums are of integers, which do not depend on their order, so every instruction set draws the same code and
// returns the same numbers. A row is read from memory once; later passes find it in the caches.
//
// This file is longer than 400 lines because whole draws and their stages over split codes use the same passes.
#include "masked_decode/masked_decode_simd.h"

#include "masked_decode/logit_lanes.h"

namespace titok::TITOK_ISA {
namespace {

// Codes whose largest logit and sum of weights are remembered, so that the last search is short.
constexpr int kBlock = 512;
constexpr int kBlocks = kMaxCodes / kBlock;
// Weights of this exponent are below 2^24.3, so that the sum of a lane over a block, of at most 128, fits into 32 bits.
constexpr float kSmallExponent = -4.0f;
static_assert(kBlock / kLanes <= 128);

// The finite logits y of a row, a vector at a time. Lanes past the last code are -inf, whose weight is 0.
template <class T, bool kGuided>
class Row {
 public:
  Row(const LogitRow& row, const RowFloats& numbers)
      : cond_(static_cast<const T*>(row.cond)),
        uncond_(static_cast<const T*>(row.uncond)),
        next_cond_(static_cast<const T*>(row.next_cond != nullptr ? row.next_cond : row.cond)),
        next_uncond_(static_cast<const T*>(row.next_uncond != nullptr ? row.next_uncond : row.uncond)),
        guidance_(numbers.guidance),
        inverse_temperature_(numbers.inverse_temperature) {}

  // Whether finite logits are used as they are stored.
  bool as_stored() const { return !kGuided && inverse_temperature_ == 1.0f; }

  // Calls visit(v, y of codes v ... v + kLanes - 1) over [begin, end); begin is a multiple of kLanes. With kStored,
  // which as_stored() must allow, logits that are not finite are left as they are.
  template <bool kStored = false, class Visit>
  TITOK_HD void each(int begin, int end, Visit visit) const {
    int v = begin;
#pragma GCC unroll 4
    for (; v + kLanes <= end; v += kLanes) visit(v, logits<kStored>(cond_ + v, uncond_ + (kGuided ? v : 0)));
    if (v < end) visit(v, tail(v, end - v));
  }

  // Asks for the same codes of the row that is drawn from next, so that its first pass does not wait for memory. They go
  // to the first-level cache (3) and fall from there to the second; asked for there (2), draws took longer.
  TITOK_HD void prefetch_next(int v) const {
    __builtin_prefetch(next_cond_ + v, 0, 3);
    if (kGuided) __builtin_prefetch(next_uncond_ + v, 0, 3);
  }

 private:
  template <bool kStored>
  TITOK_HD Floats logits(const T* cond, const T* uncond) const {
    Floats y = load_logits(cond);
    if (kStored) return y;
    if (kGuided) y = guide(y, load_logits(uncond), guidance_);
    return finite_logit(y, inverse_temperature_);
  }

  __attribute__((noinline)) Floats tail(int v, int count) const {
    T cond[kLanes] = {}, uncond[kLanes] = {};
    for (int i = 0; i < count; ++i) {
      cond[i] = cond_[v + i];
      if (kGuided) uncond[i] = uncond_[v + i];
    }
    Floats y = logits<false>(cond, uncond);
    for (int i = count; i < kLanes; ++i) y[i] = -kInfinity;
    return y;
  }

  const T* cond_;
  const T* uncond_;
  const T* next_cond_;
  const T* next_uncond_;
  float guidance_, inverse_temperature_;
};

// A sum of unsigned 32-bit numbers of at most kBlock / kLanes vectors: its lower 32 bits, and the sum of the upper halves
// of the numbers. The latter is short of the sum by less than 2^16 for each vector, which the lower bits make up.
class BlockSum {
 public:
  TITOK_HD void add(Words values) {
    low_ += values;
    high_ += values >> 16;
  }
  TITOK_HD int64_t total() const { return (add_lanes(high_) << 16) + add_lanes(low_ - (high_ << 16)); }

 private:
  Words low_ = {}, high_ = {};
};

// The weights of a row under one law: exp((y - top) * scale) of the codes whose y is at least `lowest`.
struct Law {
  float top, scale, lowest;

  TITOK_HD bool is_truncated() const { return lowest > -kInfinity; }

  TITOK_HD Words weigh_all(Floats y) const { return bit_cast<Words>(exp_weight((y - top) * scale)); }
  TITOK_HD Words weigh(Floats y) const { return y >= lowest ? weigh_all(y) : Words{}; }

  // weight * (top - y) * scale, rounded to an integer below 2^30.
  TITOK_HD Words entropy_product(Floats y, Words weight) const {
    Floats x = (y - top) * scale;
    x = larger(x, broadcast(kLowestExponent));
    const Floats wide = __builtin_convertvector(bit_cast<Ints>(weight), Floats);
    return bit_cast<Words>(__builtin_convertvector(wide * -x + 0.5f, Ints));
  }
};

// The mass of codes that are counted: 1 for each.
constexpr auto count_one = [](Floats y) { return bit_cast<Words>(y > -kInfinity ? Ints{} + 1 : Ints{}); };

struct Sums {
  int64_t weights = 0, products = 0;
};

template <class T, bool kGuided>
class Draw {
 public:
  Draw(const LogitRow& in, const RowFloats& numbers)
      : in_(in), row_(in, numbers), blocks_((in.codes + kBlock - 1) / kBlock) {
    if (blocks_ < 1) __builtin_unreachable();
  }

  DrawnToken run(float draw_scale, uint64_t uniform) {
    find_top();
    const bool greedy = draw_scale == 0.0f;
    Law law = {top_, greedy ? 1.0f : draw_scale, -kInfinity};
    if (!greedy) law.lowest = lowest_kept(law);
    const bool same_law = greedy || !in_.model_law || (law.scale == 1.0f && !law.is_truncated());
    Sums sums;
    if (!greedy || in_.needs.law) sums = sum(law, same_law);
    DrawnToken drawn = greedy ? first_largest() : find(law, scale_fraction(uniform, sums.weights));
    if (!in_.needs.law) return drawn;
    if (!same_law) {
      law = {top_, 1.0f, -kInfinity};
      sums = sum(law, true);
    }
    const float second = in_.needs.margin ? find_second() : -kInfinity;
    const int64_t other = second >= law.lowest ? exp_weight((second - top_) * law.scale) : 0;
    evaluate_law(drawn, top_, law.scale, sums.weights, sums.products, other);
    return drawn;
  }

  void partial(float draw_scale, const ChunkOfCodes& chunk, const int64_t* state, int64_t* partial) {
    if (chunk.stage == Stage::kPeak) {
      find_top();
      const int64_t code = chunk.first_code + first_largest().code;
      partial[0] = int64_t{sortable(top_ + 0.0f)} << kCodeBits | (code ^ kCodeMask);
      partial[1] = sortable((in_.needs.margin ? find_second() : -kInfinity) + 0.0f);
      return;
    }
    top_ = from_sortable(state[kTop]);
    for (int block = 0; block < blocks_; ++block) block_tops_[block] = kInfinity;  // not known in this stage
    Law law = {top_, draw_scale == 0.0f ? 1.0f : draw_scale, from_sortable(state[kLowest])};
    const uint32_t found = static_cast<uint32_t>(state[kFound]);
    const uint32_t known = ~static_cast<uint32_t>((uint64_t{1} << (chunk.shift + kDigitBits)) - 1);
    switch (chunk.stage) {
      case Stage::kCount:
        sum_by_digit<kDigitBits>(found, known, chunk.shift, partial, count_one);
        break;
      case Stage::kMass:
        sum_by_digit<kDigitBits>(found, known, chunk.shift, partial, [&](Floats y) { return law.weigh(y); });
        break;
      case Stage::kSums: {
        Sums sums = sum(law, !in_.model_law);
        partial[0] = sums.weights;
        if (in_.model_law && in_.needs.law) {
          law = {top_, 1.0f, -kInfinity};
          sums = sum(law, true);
        }
        partial[1] = in_.needs.law ? sums.weights : 0;
        partial[2] = sums.products;
        break;
      }
      default: {
        partial[0] = 0;
        // The state comes unchecked.
        if (!chunk.owns || state[kLeft] < 0 || state[kLeft] >= sum(law, false).weights) break;
        const DrawnToken drawn = find(law, state[kLeft]);
        partial[0] = (int64_t{sortable(drawn.logit + 0.0f)} << kCodeBits | (chunk.first_code + drawn.code)) + 1;
      }
    }
  }

 private:
  // Adds up the mass of the logits whose sortable integers have the bits `known` of `found`, by the digit of kBits bits
  // from `shift` on.
  template <int kBits, class Mass>
  void sum_by_digit(uint32_t found, uint32_t known, int shift, int64_t* masses, Mass mass_of) const {
    constexpr uint32_t kLargest = (1u << kBits) - 1;
    for (uint32_t digit = 0; digit <= kLargest; ++digit) masses[digit] = 0;
    row_.each(0, in_.codes, [&](int, Floats y) {
      const Words keys = sortable_lanes(y + 0.0f);
      const uint32_t chosen = lanes_where(((keys ^ found) & known) == 0);
      if (chosen != 0) add_at(keys >> shift & kLargest, mass_of(y), chosen, masses);
    });
  }

  int end_of(int block) const {
    const int end = block * kBlock + kBlock;
    return end < in_.codes ? end : in_.codes;
  }

  void find_top() { row_.as_stored() ? find_top_of<true>() : find_top_of<false>(); }

  template <bool kStored>
  void find_top_of() {
    top_ = -kInfinity;
    for (int block = 0; block < blocks_; ++block) {
      Floats most = broadcast(-kInfinity);
      row_.template each<kStored>(block * kBlock, end_of(block), [&](int, Floats y) { most = larger(y, most); });
      float block_top = most[0];
      for (int i = 1; i < kLanes; ++i) block_top = most[i] > block_top ? most[i] : block_top;
      block_top = finite_logit(block_top, 1.0f);
      block_tops_[block] = block_top;
      if (block_top > top_) {
        top_ = block_top;
        top_block_ = block;
      }
    }
  }

  // The second largest logit, which equals the largest where two codes have it; -inf where there is one code.
  float find_second() const {
    Floats most = broadcast(-kInfinity), next = most;
    row_.each(0, in_.codes, [&](int, Floats y) {
      next = larger(smaller(y, most), next);
      most = larger(y, most);
    });
    float first = -kInfinity, second = -kInfinity;
    for (int i = 0; i < 2 * kLanes; ++i) {
      const float y = i < kLanes ? most[i] : next[i - kLanes];
      const float lesser = y < first ? y : first;
      second = lesser > second ? lesser : second;
      first = y > first ? y : first;
    }
    return second;
  }

  DrawnToken first_largest() const {
    DrawnToken drawn = {-1, top_, 0.0f, 0.0f, 0.0f};
    row_.each(top_block_ * kBlock, end_of(top_block_), [&](int v, Floats y) {
      for (int i = 0; i < kLanes && drawn.code < 0; ++i) {
        if (y[i] == top_) drawn.code = v + i;
      }
    });
    return drawn;
  }

  // The sums over all codes; the sum of the weights of each block is kept.
  Sums sum(const Law& law, bool with_entropy) {
    if (with_entropy && in_.needs.entropy) return sum_products(law);
    if (law.is_truncated()) return sum_weights<false>(law, [&](Floats y) { return law.weigh(y); });
    // A stored logit that is not finite has the weight 0, as the number that stands for it: +inf would be the top.
    if (row_.as_stored() && law.scale == 1.0f && law.top > -FLT_MAX / 2 && law.top < FLT_MAX) {
      return sum_weights<true>(law, [&](Floats y) { return bit_cast<Words>(exp_weight(y - law.top)); });
    }
    return sum_weights<false>(law, [&](Floats y) { return law.weigh_all(y); });
  }

  // The exponent of the largest weight of a block.
  float exponent_of(const Law& law, int block) const { return (block_tops_[block] - law.top) * law.scale; }

  template <bool kStored, class Weigh>
  Sums sum_weights(const Law& law, Weigh weigh) {
    Sums all;
    for (int block = 0; block < blocks_; ++block) {
      const int begin = block * kBlock, end = end_of(block);
      const float exponent = exponent_of(law, block);
      int64_t total = 0;
      if (exponent <= kLowestExponent || block_tops_[block] < law.lowest) {
        // All weights are 0.
        for (int v = begin; v < end; v += kLanes) row_.prefetch_next(v);
      } else if (exponent <= kSmallExponent) {
        Words low = {};
        row_.template each<kStored>(begin, end, [&](int v, Floats y) {
          row_.prefetch_next(v);
          low += weigh(y);
        });
        total = add_lanes(low);
      } else {
        BlockSum weights;
        row_.template each<kStored>(begin, end, [&](int v, Floats y) {
          row_.prefetch_next(v);
          weights.add(weigh(y));
        });
        total = weights.total();
      }
      block_weights_[block] = total;
      all.weights += total;
    }
    return all;
  }

  Sums sum_products(const Law& law) {
    Sums all;
    for (int block = 0; block < blocks_; ++block) {
      BlockSum weights, products;
      row_.each(block * kBlock, end_of(block), [&](int v, Floats y) {
        row_.prefetch_next(v);
        const Words weight = law.weigh(y);
        weights.add(weight);
        products.add(law.entropy_product(y, weight));
      });
      all.products += products.total();
      block_weights_[block] = weights.total();
      all.weights += block_weights_[block];
    }
    return all;
  }

  // The code in which unit `left` of the cumulative weights lies: first the block, then the vector, then the lane.
  DrawnToken find(const Law& law, int64_t left) const {
    DrawnToken drawn = {-1, 0.0f, 0.0f, 0.0f, 0.0f};
    int block = 0;
    while (left >= block_weights_[block]) left -= block_weights_[block++];
    row_.each(block * kBlock, end_of(block), [&](int v, Floats y) {
      if (drawn.code >= 0) return;
      const Words weight = law.weigh(y);
      BlockSum all;
      all.add(weight);
      if (left >= all.total()) {
        left -= all.total();
        return;
      }
      int i = 0;
      while (left >= static_cast<int64_t>(weight[i])) left -= weight[i++];
      drawn.code = v + i;
      drawn.logit = y[i];
    });
    return drawn;
  }

  // The smallest logit that truncation keeps, first of the top k, then of the top p of what is left.
  float lowest_kept(Law law) const {
    if (in_.top_k > 0 && in_.top_k < in_.codes) {
      law.lowest = logit_at([&](int64_t) { return in_.top_k - 1; }, count_one);
    }
    if (in_.top_p < kTopPOne) {
      const auto limit = [&](int64_t total) { return scale_fraction(uint64_t(in_.top_p) << 32, total); };
      const float nucleus = logit_at(limit, [&](Floats y) { return law.weigh(y); });
      law.lowest = nucleus > law.lowest ? nucleus : law.lowest;
    }
    return law.lowest;
  }

  // The logit in which unit `unit_of(total mass)` of the mass lies, counted from the largest logit down. Equal logits
  // count as one. Finds the bits of its sortable integer from the highest down, 11 in each pass over the row; all passes
  // but the first need the mass of the few codes only that share the bits found so far.
  template <class Unit, class Mass>
  float logit_at(Unit unit_of, Mass mass_of) const {
    constexpr int kBits = 11;
    constexpr int kShifts[] = {32 - kBits, 32 - 2 * kBits, 0};
    int64_t masses[1 << kBits];
    uint32_t found = 0, known = 0;
    int64_t left = -1;
    for (const int shift : kShifts) {
      sum_by_digit<kBits>(found, known, shift, masses, mass_of);
      if (known == 0) {
        int64_t total = 0;
        for (const int64_t mass : masses) total += mass;
        left = unit_of(total);
      }
      uint32_t digit = (1u << kBits) - 1;
      known |= digit << shift;
      while (left >= masses[digit]) left -= masses[digit--];
      found |= digit << shift;
    }
    return from_sortable(found);
  }

  const LogitRow& in_;
  const Row<T, kGuided> row_;
  const int blocks_;
  float top_ = 0.0f;
  int top_block_ = 0;
  float block_tops_[kBlocks];
  int64_t block_weights_[kBlocks];
};

template <class T>
DrawnToken draw(const LogitRow& row, const RowFloats& numbers, uint64_t uniform) {
  const bool guided = row.uncond != nullptr && numbers.guidance != 1.0f;
  if (guided) return Draw<T, true>(row, numbers).run(numbers.draw_scale, uniform);
  return Draw<T, false>(row, numbers).run(numbers.draw_scale, uniform);
}

DrawnToken draw_for_dtype(const LogitRow& row, const RowFloats& numbers, uint64_t uniform) {
  switch (row.dtype) {
    case DType::kBFloat16: return draw<BFloat16>(row, numbers, uniform);
    case DType::kFloat16: return draw<Float16>(row, numbers, uniform);
    default: return draw<float>(row, numbers, uniform);
  }
}

template <class T>
void partial(const LogitRow& row, const RowFloats& numbers, const ChunkOfCodes& chunk, const int64_t* state,
             int64_t* result) {
  const float scale = usable_draw_scale(numbers.draw_scale) ? numbers.draw_scale : 0.0f;
  if (row.uncond != nullptr && numbers.guidance != 1.0f) {
    Draw<T, true>(row, numbers).partial(scale, chunk, state, result);
  } else {
    Draw<T, false>(row, numbers).partial(scale, chunk, state, result);
  }
}

void partial_for_dtype(const LogitRow& row, const RowFloats& numbers, const ChunkOfCodes& chunk,
                       const int64_t* state, int64_t* result) {
  switch (row.dtype) {
    case DType::kBFloat16: return partial<BFloat16>(row, numbers, chunk, state, result);
    case DType::kFloat16: return partial<Float16>(row, numbers, chunk, state, result);
    default: return partial<float>(row, numbers, chunk, state, result);
  }
}

}  // namespace
}  // namespace titok::TITOK_ISA

titok::ComputePartial titok::compute_partial_kernel(TITOK_ISA::ThisIsa) { return TITOK_ISA::partial_for_dtype; }

titok::DrawToken titok::draw_token_kernel(TITOK_ISA::ThisIsa) { return TITOK_ISA::draw_for_dtype; }
