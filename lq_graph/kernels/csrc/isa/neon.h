// The vector layer on aarch64 with SDOT, and with SMMLA if LQ_I8MM is defined: 16-byte registers, 32 of
// them. isa/avx512.h tells what each name means.
//
// Both instructions multiply signed by signed bytes: nothing is added to w, and w and x are split alike.
// The sizes are for Kunpeng 920 and Neoverse: two vector instructions and two loads in a cycle, SDOT
// takes four cycles, 512 KiB of L2 and 64 KiB of L1 for each core. They were never run there.
#ifndef LQ_GRAPH_ISA_NEON_H_
#define LQ_GRAPH_ISA_NEON_H_
#include <arm_neon.h>

#include <cstdint>

#ifdef LQ_I8MM
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod+i8mm")))
#else
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
#define INLINE_TARGET __attribute__((always_inline)) inline TARGET

namespace {

constexpr int64_t kBytes = 16;
typedef int32_t Ints __attribute__((vector_size(16), may_alias));
typedef float Floats __attribute__((vector_size(16), may_alias));

template <bool int4>
constexpr int kParts = int4 ? 2 : 1;
template <bool int4>
constexpr int kAdded = 0;
template <bool int4>
constexpr int kRows = int4 ? 4 : 6;
template <bool int4>
constexpr bool kPrepares = false;  // a word of x in all lanes takes a vector instruction
constexpr int kGroup = 4;
template <bool int4>
constexpr int kGroupRows = 4;
// From here on the kernel for many rows takes fewer instructions, packing included. Only that one uses
// SMMLA, which computes twice as much as SDOT.
#ifdef LQ_I8MM
constexpr int64_t kManyRows = 16;
#else
constexpr int64_t kManyRows = 24;
#endif
constexpr int kAccumulators = 16;  // 8 hide SDOT's latency; beside 16, a step's registers of x fit
constexpr int64_t kSliceColumns = 16;
constexpr int64_t kSliceDepth = 1024, kSliceStride = 1024;
constexpr int64_t kSliceOfX = 1 << 18;

template <bool int4>
INLINE_TARGET Ints Dot(Ints sum, Ints w, Ints x) {
  return (Ints)vdotq_s32((int32x4_t)sum, (int8x16_t)w, (int8x16_t)x);
}

template <bool int4>
INLINE_TARGET void Split(Ints v, Ints* parts) {
  parts[0] = v;
  if constexpr (int4) {
    parts[0] = (Ints)vshrq_n_s8(vshlq_n_s8((int8x16_t)v, 4), 4);
    parts[1] = (Ints)vshrq_n_s8((int8x16_t)v, 4);
  }
}
template <bool int4>
INLINE_TARGET void SplitX(Ints v, Ints* parts) {
  Split<int4>(v, parts);
}

INLINE_TARGET Ints LoadNz(const uint8_t* w, int64_t) {
  return *reinterpret_cast<const Ints __attribute__((aligned(1)))*>(w);
}

INLINE_TARGET void StoreSums(Ints a, Ints b, Ints c, Ints d, bool first, int32_t* out) {
  int32x4_t sums =
      vpaddq_s32(vpaddq_s32((int32x4_t)a, (int32x4_t)b), vpaddq_s32((int32x4_t)c, (int32x4_t)d));
  if (!first) sums = vaddq_s32(sums, vld1q_s32(out));
  vst1q_s32(out, sums);
}

// The even and the odd 64-bit halves of two registers.
INLINE_TARGET Ints FirstHalves(Ints a, Ints b) {
  return (Ints)vtrn1q_s64((int64x2_t)a, (int64x2_t)b);
}
INLINE_TARGET Ints SecondHalves(Ints a, Ints b) {
  return (Ints)vtrn2q_s64((int64x2_t)a, (int64x2_t)b);
}

// 4 x 4 words transposed.
INLINE_TARGET void Transpose(Ints* words) {
  const auto a = (int32x4_t)words[0], b = (int32x4_t)words[1], c = (int32x4_t)words[2],
             d = (int32x4_t)words[3];
  const auto even = (Ints)vtrn1q_s32(a, b), odd = (Ints)vtrn2q_s32(a, b);
  const auto more_even = (Ints)vtrn1q_s32(c, d), more_odd = (Ints)vtrn2q_s32(c, d);
  words[0] = FirstHalves(even, more_even);
  words[1] = FirstHalves(odd, more_odd);
  words[2] = SecondHalves(even, more_even);
  words[3] = SecondHalves(odd, more_odd);
}

// A step takes 16 bytes of a row of w at once: to load four bytes into all lanes would take a vector
// instruction beside the load.
constexpr int64_t kStepBytes = 16;

#ifdef LQ_I8MM
// SMMLA multiplies two rows of x by two columns, eight bytes each: its four sums are two of the first
// row, then two of the second.
constexpr int kTogether = 2;

template <bool int4>
INLINE_TARGET void DotStep(Ints* sums, const Ints* w, const Ints* x) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half)
#pragma GCC unroll 2
    for (int pair = 0; pair < 2; ++pair)
      sums[pair] = (Ints)vmmlaq_s32((int32x4_t)sums[pair], (int8x16_t)x[2 * half + pair],
                                    (int8x16_t)w[half]);
}
INLINE_TARGET void OrderSums(Ints* sums) {
  const auto first = (int32x4_t)sums[0], second = (int32x4_t)sums[1];
  sums[0] = (Ints)vuzp1q_s32(first, second);
  sums[1] = (Ints)vuzp2q_s32(first, second);
}
INLINE_TARGET void OrderX(Ints* rows) {
  const Ints a = rows[0], b = rows[1], c = rows[2], d = rows[3];
  rows[0] = FirstHalves(a, b);
  rows[1] = FirstHalves(c, d);
  rows[2] = SecondHalves(a, b);
  rows[3] = SecondHalves(c, d);
}
TARGET void OrderW(uint8_t* w, int64_t columns, int64_t bytes) {
  for (int64_t j = 0; j < columns; j += 2, w += 2 * kSliceStride)
    for (int64_t at = 0; at < bytes; at += kBytes) {
      auto* const a = reinterpret_cast<Ints*>(w + at);
      auto* const b = reinterpret_cast<Ints*>(w + kSliceStride + at);
      const Ints first = FirstHalves(*a, *b), second = SecondHalves(*a, *b);
      *a = first;
      *b = second;
    }
}
#else
constexpr int kTogether = 4;  // so that four sums do not wait for one another

template <int word>
INLINE_TARGET void DotWord(Ints* sums, const Ints* w, Ints x) {
#pragma GCC unroll 4
  for (int j = 0; j < kTogether; ++j)
    sums[j] = (Ints)vdotq_laneq_s32((int32x4_t)sums[j], (int8x16_t)x, (int8x16_t)w[j], word);
}
template <bool int4>
INLINE_TARGET void DotStep(Ints* sums, const Ints* w, const Ints* x) {
  DotWord<0>(sums, w, x[0]);
  DotWord<1>(sums, w, x[1]);
  DotWord<2>(sums, w, x[2]);
  DotWord<3>(sums, w, x[3]);
}
INLINE_TARGET void OrderSums(Ints*) {}
INLINE_TARGET void OrderX(Ints* rows) { Transpose(rows); }
INLINE_TARGET void OrderW(uint8_t*, int64_t, int64_t) {}
#endif

INLINE_TARGET void LoadPairs(const void* from, Ints* even, Ints* odd) {
  const int32x4x2_t pairs = vld2q_s32(static_cast<const int32_t*>(from));
  *even = (Ints)pairs.val[0];
  *odd = (Ints)pairs.val[1];
}

INLINE_TARGET Floats Round(Floats v) { return (Floats)vrndnq_f32((float32x4_t)v); }
INLINE_TARGET Ints ToInts(Floats v) { return (Ints)vcvtnq_s32_f32((float32x4_t)v); }
INLINE_TARGET Ints ToInt8(Ints a, Ints b, Ints c, Ints d) {
  const int16x8_t ab = vcombine_s16(vqmovn_s32((int32x4_t)a), vqmovn_s32((int32x4_t)b));
  const int16x8_t cd = vcombine_s16(vqmovn_s32((int32x4_t)c), vqmovn_s32((int32x4_t)d));
  return (Ints)vcombine_s8(vqmovn_s16(ab), vqmovn_s16(cd));
}
INLINE_TARGET Ints ToInt8(Ints ab, Ints cd) {
  return (Ints)vcombine_s8(vqmovn_s16((int16x8_t)ab), vqmovn_s16((int16x8_t)cd));
}

INLINE_TARGET Floats LoadFloat16(const void* from) {
  return (Floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(static_cast<const uint16_t*>(from))));
}
INLINE_TARGET void StoreFloat16(void* to, Floats v) {
  vst1_u16(static_cast<uint16_t*>(to), vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
}
INLINE_TARGET Floats ToFloat16(Floats v) {
  return (Floats)vcvt_f32_f16(vcvt_f16_f32((float32x4_t)v));
}
INLINE_TARGET void StoreLow16(void* to, Ints v) {
  vst1_s16(static_cast<int16_t*>(to), vmovn_s32((int32x4_t)v));
}
INLINE_TARGET void StoreInt8(void* to, Ints v) {
  const int16x4_t words = vqmovn_s32((int32x4_t)v);
  const int8x8_t bytes = vqmovn_s16(vcombine_s16(words, words));
  __builtin_memcpy(to, &bytes, 4);
}

}  // namespace

#endif  // LQ_GRAPH_ISA_NEON_H_
