// The kernels with NEON, SDOT and SMMLA.
#define LQ_I8MM
#include <sys/auxv.h>

#include "../isa/neon.h"
// the vector layer comes first
#include "../run.h"

namespace {

bool IsSupported() {
  return getauxval(AT_HWCAP) & 1UL << 20 &&  // HWCAP_ASIMDDP and
         getauxval(AT_HWCAP2) & 1UL << 13;   // HWCAP2_I8MM, which old headers lack
}

}  // namespace

LQ_DEFINE_TARGET(neon_i8mm)
