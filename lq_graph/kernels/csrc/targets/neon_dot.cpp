// The kernels with NEON and SDOT.
#include <sys/auxv.h>

#include "../isa/neon.h"
// the vector layer comes first
#include "../run.h"

namespace {

bool IsSupported() {
  return getauxval(AT_HWCAP) & 1UL << 20;  // HWCAP_ASIMDDP, which old headers lack
}

}  // namespace

LQ_DEFINE_TARGET(neon_dot)
