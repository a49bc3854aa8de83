// Philox4x32-10 (Salmon et al., SC 2011) for host and device. titok/ops/philox.py is the same in PyTorch and
// documents which counter and which word serve what.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace titok {

struct PhiloxWords {
  uint32_t w0, w1, w2, w3;
};

TITOK_HD PhiloxWords philox4x32(PhiloxWords c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c.w0;
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c.w2;
    c = {uint32_t(p1 >> 32) ^ c.w1 ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c.w3 ^ k1, uint32_t(p0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// The noise of one position of one sample in one step.
struct DecodeNoise {
  uint64_t uniform;      // of the draw
  uint32_t gumbel_word;  // of the confidence
};

TITOK_HD DecodeNoise decode_noise(uint64_t seed, uint64_t sample, uint32_t step, uint32_t position) {
  const PhiloxWords words = philox4x32({position, step, uint32_t(sample), uint32_t(sample >> 32)}, uint32_t(seed),
                                       uint32_t(seed >> 32));
  return {uint64_t{words.w0} << 32 | words.w1, words.w2};
}

}  // namespace titok
