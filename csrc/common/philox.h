// Philox4x32-10, a counter-based random number generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011), for CPU and GPU. titok/ops/philox.py is the same in PyTorch and documents what each counter and word serves.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace titok {

struct PhiloxWords {
  uint32_t w0, w1, w2, w3;
};

// Four random words for a counter (four words) and a key (two words).
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

}  // namespace titok
