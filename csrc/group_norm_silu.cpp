#include "group_norm_silu.h"

#include <vector>

#include "cpu_isa.h"

namespace titok {

void launch_group_norm_silu(const GroupNormSiluArgs& args) {
  std::vector<double> scratch(group_norm_silu_scratch(args));
  switch (cpu_isa()) {
#if defined(__x86_64__)
    case CpuIsa::kAvx512: return avx512::group_norm_silu(args, scratch.data());
    case CpuIsa::kAvx2: return avx2::group_norm_silu(args, scratch.data());
#endif
    default: return generic::group_norm_silu(args, scratch.data());
  }
}

}  // namespace titok
