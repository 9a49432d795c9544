// What this machine can do at most: int8 products from registers, and bytes read from memory.
// rounds.py compiles and calls this. The threads are torch's own, through the OpenMP runtime it
// has loaded: others would compete with them, for they spin a while after each piece of work.
//
// The products are those of one instruction set: its shortest exact sequence for int8 times int8,
// summed in int32. The loops are assembly, so that no compiler changes or removes them. Each
// product adds to one of 12 registers: so none waits for the one before.
#include <cstdint>
#include <cstring>

extern "C" int omp_get_thread_num();

namespace {

struct Target {
  const char* name;
  bool (*is_supported)();
  void (*products)(int64_t steps);
  int64_t in_step;                                   // multiply-accumulates in a step
  void (*read)(const uint8_t* from, int64_t steps);  // 256 bytes in a step
};

#define TWELVE(one) \
  one(0) one(1) one(2) one(3) one(4) one(5) one(6) one(7) one(8) one(9) one(10) one(11)

#if defined(__x86_64__)
}  // namespace
#include <sys/syscall.h>
#include <unistd.h>
namespace {

#define CLOBBERED                                                                                 \
  "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", \
      "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"

constexpr int32_t kWord = 0x01020304;

#define PRODUCTS(Name, vector, one)                                            \
  void Name(int64_t steps) {                                                   \
    asm volatile("vpbroadcastd %1, %%" vector "14\nvpbroadcastd %1, %%" vector \
                 "15\n"                                                        \
                 "1:\n" TWELVE(one) "dec %0\njnz 1b\nvzeroupper"               \
                 : "+r"(steps)                                                 \
                 : "m"(kWord)                                                  \
                 : CLOBBERED);                                                 \
  }

#define ONE(i) "vpdpbusd %%zmm14, %%zmm15, %%zmm" #i "\n"
PRODUCTS(Avx512Vnni, "zmm", ONE)
#undef ONE
#define ONE(i) "%{vex%} vpdpbusd %%ymm14, %%ymm15, %%ymm" #i "\n"
PRODUCTS(AvxVnni, "ymm", ONE)
#undef ONE
// VPMADDUBSW multiplies bytes, but its 16-bit sums saturate: so the bytes are extended to 16 bits.
// That is not counted here, because it may be done once for many products.
#define ONE(i) "vpmaddwd %%ymm14, %%ymm15, %%ymm13\nvpaddd %%ymm13, %%ymm" #i ", %%ymm" #i "\n"
PRODUCTS(Avx2, "ymm", ONE)
#undef ONE

// Tiles of 16 rows of 64 bytes. Compiled, but never run on a processor that has them.
void Amx(int64_t steps) {
  alignas(64) struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } tiles;
  asm volatile(
      "ldtilecfg %1\n"
      "1:\n"
      "tdpbssd %%tmm6, %%tmm4, %%tmm0\ntdpbssd %%tmm7, %%tmm4, %%tmm1\n"
      "tdpbssd %%tmm6, %%tmm5, %%tmm2\ntdpbssd %%tmm7, %%tmm5, %%tmm3\n"
      "dec %0\njnz 1b\ntilerelease"
      : "+r"(steps)
      : "m"(tiles)
      : "cc");
}

void Read64(const uint8_t* from, int64_t steps) {
  asm volatile(
      "1:\n"
      "vpxorq (%0), %%zmm0, %%zmm0\nvpxorq 64(%0), %%zmm1, %%zmm1\n"
      "vpxorq 128(%0), %%zmm2, %%zmm2\nvpxorq 192(%0), %%zmm3, %%zmm3\n"
      "add $256, %0\ndec %1\njnz 1b\nvzeroupper"
      : "+r"(from), "+r"(steps)::CLOBBERED);
}

void Read32(const uint8_t* from, int64_t steps) {
  asm volatile(
      "1:\n"
      "vpxor (%0), %%ymm0, %%ymm0\nvpxor 32(%0), %%ymm1, %%ymm1\n"
      "vpxor 64(%0), %%ymm2, %%ymm2\nvpxor 96(%0), %%ymm3, %%ymm3\n"
      "vpxor 128(%0), %%ymm4, %%ymm4\nvpxor 160(%0), %%ymm5, %%ymm5\n"
      "vpxor 192(%0), %%ymm6, %%ymm6\nvpxor 224(%0), %%ymm7, %%ymm7\n"
      "add $256, %0\ndec %1\njnz 1b\nvzeroupper"
      : "+r"(from), "+r"(steps)::CLOBBERED);
}

bool HasAmx() {
  constexpr long kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-int8") && !syscall(SYS_arch_prctl, kAskForState, kTileData);
}

// The best one first.
const Target kTargets[] = {
    {"amx", HasAmx, Amx, 4 * 16 * 16 * 64, Read64},
    {"avx512vnni", [] { return __builtin_cpu_supports("avx512vnni") != 0; }, Avx512Vnni, 12 * 64,
     Read64},
    {"avxvnni", [] { return __builtin_cpu_supports("avxvnni") != 0; }, AvxVnni, 12 * 32, Read32},
    {"avx2", [] { return __builtin_cpu_supports("avx2") != 0; }, Avx2, 12 * 16, Read32},
};

#elif defined(__aarch64__)
}  // namespace
#include <sys/auxv.h>
namespace {

#define CLOBBERED \
  "cc", "memory", "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11"

#define PRODUCTS(Name, one)                                                                  \
  void Name(int64_t steps) {                                                                 \
    asm volatile(".arch armv8.2-a+dotprod+i8mm\n1:\n" TWELVE(one) "subs %0, %0, #1\nb.ne 1b" \
                 : "+r"(steps)::CLOBBERED);                                                  \
  }

#define ONE(i) "sdot v" #i ".4s, v30.16b, v31.16b\n"
PRODUCTS(Dot, ONE)
#undef ONE
#define ONE(i) "smmla v" #i ".4s, v30.16b, v31.16b\n"
PRODUCTS(I8mm, ONE)
#undef ONE

void Read(const uint8_t* from, int64_t steps) {
  asm volatile(
      "1:\n"
      "ldp q0, q1, [%0]\nldp q2, q3, [%0, #32]\nldp q4, q5, [%0, #64]\nldp q6, q7, [%0, #96]\n"
      "ldp q0, q1, [%0, #128]\nldp q2, q3, [%0, #160]\nldp q4, q5, [%0, #192]\n"
      "ldp q6, q7, [%0, #224]\nadd %0, %0, #256\nsubs %1, %1, #1\nb.ne 1b"
      : "+r"(from), "+r"(steps)::CLOBBERED);
}

constexpr unsigned long kHasDot = 1 << 20, kHasI8mm = 1 << 13;  // HWCAP_ASIMDDP, HWCAP2_I8MM

// The best one first.
const Target kTargets[] = {
    {"neon_i8mm", [] { return (getauxval(AT_HWCAP2) & kHasI8mm) != 0; }, I8mm, 12 * 32, Read},
    {"neon_dot", [] { return (getauxval(AT_HWCAP) & kHasDot) != 0; }, Dot, 12 * 16, Read},
};
#endif

const Target* target = nullptr;

}  // namespace

extern "C" {

// Takes an instruction set for all calls from now on, "" for the best one that this processor has.
// Returns its name, or null if the processor does not have it.
const char* use(const char* name) {
  for (const Target& one : kTargets)
    if ((!*name || !std::strcmp(name, one.name)) && one.is_supported()) {
      target = &one;
      return one.name;
    }
  return nullptr;
}

// At least `count` multiply-accumulates of int8, shared out over the threads.
void int8_products(int64_t count, int threads) {
  const int64_t steps = count / target->in_step / threads + 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
  target->products(steps);
}

// Every byte of a buffer, read once, except a rest of less than 256 bytes for each thread.
void read_bytes(const uint8_t* buffer, int64_t bytes, int threads) {
  const int64_t part = bytes / threads, steps = part / 256;
  if (!steps) return;
#pragma omp parallel num_threads(threads) if (threads > 1)
  target->read(buffer + omp_get_thread_num() * part, steps);
}
}
