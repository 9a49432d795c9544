// The kernels with AMX int8, and AVX-512 VNNI where AMX does not serve. Untested on hardware.
#define LQ_AMX
#include "../isa/avx512.h"
// the vector layer comes first
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "../run.h"

namespace {

#ifdef LQ_EMULATED_AMX  // by tests/kernels/amx_emulator.cpp

bool IsSupported() { return true; }
bool Permit() { return true; }

#else

// of Linux's arch_prctl
constexpr int kGetSupported = 0x1021, kRequestPermission = 0x1023, kTileData = 18;

bool IsSupported() {
  unsigned a, b, c, d;
  const bool tiles =
      __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 3) == 3;  // AMX-TILE, INT8
  uint64_t by_linux = 0;
  return tiles && __builtin_cpu_supports("avx512vnni") &&
         !syscall(SYS_arch_prctl, kGetSupported, &by_linux) && by_linux >> kTileData & 1;
}

// Without this permission, which is the process's, the first tile instruction ends it.
bool Permit() { return !syscall(SYS_arch_prctl, kRequestPermission, kTileData); }

#endif

}  // namespace

extern const LqTarget kTarget_amx{"amx",         IsSupported, Matmul, Quantize, Layer,
                                  PreparedBytes, Prepare,     true,   Permit};
