// The kernels with AVX-512 VNNI.
#include "../isa/avx512.h"
// the vector layer comes first
#include "../run.h"

namespace {

bool IsSupported() {
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

}  // namespace

LQ_DEFINE_TARGET(avx512vnni)
