// The kernels with AVX2.
#include "../isa/avx2.h"
// the vector layer comes first
#include "../run.h"

namespace {

bool IsSupported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"); }

}  // namespace

LQ_DEFINE_TARGET(avx2)
