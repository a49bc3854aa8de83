// Huge pages for large blocks of fresh memory.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace titok {

// Asks Linux to back a block of at least 32 MiB with pages of 2 MiB; does nothing for smaller ones.
//
// glibc maps such a block afresh at each allocation. With pages of 4 KiB the page faults of touching it then take longer
// than a kernel that writes it once.
inline void ask_for_huge_pages([[maybe_unused]] void* block, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  if (bytes < (size_t{32} << 20)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(block) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(block) + bytes) & ~(kPage - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only a hint, so errors are ignored
#endif
}

}  // namespace titok
