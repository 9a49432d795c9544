// The CPU kernels of quantized layers: x, int8 or packed int4, times the weight as it is stored, ND
// (n, k) or FRACTAL_NZ, exact in int32, and LinearQuant's epilogue. Where no instruction set of targets/
// is supported, numerics.py computes the same with torch. Python loads this with ctypes; it does not use
// torch.
//
// The threads are those of torch's OpenMP runtime: this library is not linked to a runtime, and finds
// GOMP_parallel among the symbols of the process. So torch.set_num_threads applies here too.
//
// Each file of targets/ compiles the same kernels (run.h) for one instruction set. This file chooses one
// at run time.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "call.h"

#define LQ_TARGET(name) extern const LqTarget kTarget_##name;
#include "targets.h"
#undef LQ_TARGET

namespace {

// The best one first.
const LqTarget* const kTargets[] = {
#define LQ_TARGET(name) &kTarget_##name,
#include "targets.h"
#undef LQ_TARGET
};

const LqTarget* target = nullptr;

// Whether no packed or folded scale holds infinity or NaN: how the chips compute with them is not
// published.
bool IsFinite(const LqMatmul& call) {
  if (call.scale_kind == kFloat || call.output == 0) return true;
  constexpr int32_t kExponent = 0x7F800000;
  const int64_t step = call.scale_kind == kPacked ? 2 : 1;  // words; little-endian
  const auto* word = static_cast<const int32_t*>(call.scale);
  const int64_t count = call.scale_stride ? call.n : 1;
  bool finite = true;  // no early end, so that the compiler makes vectors of it
  for (int64_t i = 0; i < count; ++i) finite &= (word[i * step] & kExponent) != kExponent;
  if (call.scale_kind == kFolded && call.offset) {
    const int64_t offsets = call.offset_stride ? call.n : 1;
    for (int64_t i = 0; i < offsets; ++i) {
      int32_t bits;
      std::memcpy(&bits, call.offset + i, 4);
      finite &= (bits & kExponent) != kExponent;
    }
  }
  return finite;
}

}  // namespace

extern "C" {

// The instruction sets that this library has, the best one first, each with "-" if this processor does
// not have it, "?" if it has it but the set is untested, else "+": "avx512vnni+ avx2+ amx?".
const char* lq_targets() {
  static char text[256];
  char* end = text;
  for (const LqTarget* one : kTargets) {
    if (end != text) *end++ = ' ';
    const size_t size = std::strlen(one->name);
    std::memcpy(end, one->name, size);
    end += size;
    *end++ = !one->is_supported() ? '-' : one->untested ? '?' : '+';
  }
  *end = 0;
  return text;
}

// Takes the instruction set of this name for all calls from now on. Returns whether that can be.
int lq_use(const char* name) {
  for (const LqTarget* one : kTargets)
    if (!std::strcmp(one->name, name) && one->is_supported() && (!one->permit || one->permit())) {
      target = one;
      return 1;
    }
  return 0;
}

#ifndef LQ_SOURCES
#define LQ_SOURCES ""
#endif

// The digest of the sources that this was built from, as CMakeLists.txt computes it.
const char* lq_sources() { return LQ_SOURCES; }

// Bytes that lq_prepare writes for the w of a call. 0: another struct.
int64_t lq_prepared_bytes(const LqMatmul* call, size_t bytes) {
  return bytes == sizeof(LqMatmul) ? target->prepared_bytes(*call) : 0;
}

// Packs the w of a call for LqMatmul::prepared into `out`.
int lq_prepare(const LqMatmul* call, size_t bytes, uint8_t* out) {
  if (bytes != sizeof(LqMatmul)) return kOtherStruct;
  target->prepare(*call, out);
  return kDone;
}

// Returns one of LqAnswer. `bytes` is the size of LqMatmul in the caller.
int lq_matmul(const LqMatmul* call, size_t bytes) {
  if (bytes != sizeof(LqMatmul)) return kOtherStruct;
  if (!IsFinite(*call)) return kNotFinite;
  return target->matmul(*call);
}

// Returns one of LqAnswer.
int lq_quantize(const LqQuantize* call, size_t bytes) {
  if (bytes != sizeof(LqQuantize)) return kOtherStruct;
  return target->quantize(*call);
}

// Returns one of LqAnswer.
int lq_layer(const LqLayer* call, size_t bytes) {
  if (bytes != sizeof(LqLayer)) return kOtherStruct;
  if (!IsFinite(call->matmul)) return kNotFinite;
  return target->layer(*call);
}
}
