// What the kernels need beside isa/'s functions, of the same registers.
#ifndef LQ_GRAPH_SIMD_H_
#define LQ_GRAPH_SIMD_H_
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kLanes = kBytes / 4;
typedef Ints LooseInts __attribute__((aligned(1)));
typedef uint16_t LooseShorts __attribute__((vector_size(kBytes / 2), aligned(1), may_alias));

INLINE_TARGET Ints Load(const void* from) { return *static_cast<const LooseInts*>(from); }
INLINE_TARGET void Store(void* to, Ints v) { *static_cast<LooseInts*>(to) = v; }
INLINE_TARGET Floats LoadFloats(const void* from) { return (Floats)Load(from); }
INLINE_TARGET Ints Set(int32_t value) { return Ints{} + value; }
INLINE_TARGET Floats Set(float value) { return Floats{} + value; }
INLINE_TARGET Floats ToFloats(Ints v) { return __builtin_convertvector(v, Floats); }

// `bytes` of memory, and zeros behind them.
INLINE_TARGET Ints LoadSome(const void* from, int64_t bytes) {
  if (bytes >= kBytes) return Load(from);
  Ints v{};
  if (bytes > 0) std::memcpy(&v, from, bytes);
  return v;
}

// A register of a row of w, from byte `at` on; `step` is w_step.
template <bool nz>
INLINE_TARGET Ints LoadWeight(const uint8_t* w, int64_t at, int64_t step) {
  if constexpr (nz) return LoadNz(w + at / 32 * step + at % 32, step);
  return Load(w + at);
}

INLINE_TARGET Floats Clamp(Floats v, float low, float high) {
  const Floats least = Set(low), most = Set(high);
  v = least > v ? least : v;  // NaN stays NaN
  return most < v ? most : v;
}

// float32 to bfloat16, rounded half to even; NaN stays NaN, quiet.
INLINE_TARGET Ints ToBfloat16(Floats value) {
  typedef uint32_t Words __attribute__((vector_size(kBytes), may_alias));
  const Words bits = (Words)value;
  const Words rounded = (bits + ((bits >> 16 & 1) + 0x7FFF)) >> 16;
  return value != value ? Set(0x7FC0) : (Ints)rounded;
}

INLINE_TARGET Floats LoadBfloat16(const void* from) {
  return (Floats)(__builtin_convertvector(*static_cast<const LooseShorts*>(from), Ints) << 16);
}

// The sum of the lanes.
INLINE_TARGET int32_t Sum(Ints v) {
  int32_t lanes[kLanes], sum = 0;
  Store(lanes, v);
  for (int32_t lane : lanes) sum += lane;
  return sum;
}

}  // namespace

#endif  // LQ_GRAPH_SIMD_H_
