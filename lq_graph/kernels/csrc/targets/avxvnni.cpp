// The kernels with AVX-VNNI.
#define LQ_AVXVNNI
#include "../isa/avx2.h"
// the vector layer comes first
#include "../run.h"

namespace {

bool IsSupported() { return __builtin_cpu_supports("avxvnni") && __builtin_cpu_supports("f16c"); }

}  // namespace

LQ_DEFINE_TARGET(avxvnni)
