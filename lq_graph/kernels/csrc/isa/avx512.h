// The vector layer on x86-64 with AVX-512 VNNI: 64-byte registers. With LQ_AMX, the same beside AMX's
// tile registers, which the kernel for many rows multiplies with (multiply_amx.h).
//
// Each file in isa/ defines the same names. A register of w holds kBytes bytes; Split turns them into
// kParts registers whose values Dot multiplies, four bytes of w by four of x for each int32 sum.
#ifndef LQ_GRAPH_ISA_AVX512_H_
#define LQ_GRAPH_ISA_AVX512_H_
#include <immintrin.h>

#include <cstdint>

#ifdef LQ_AMX
#define LQ_AMX_TARGET "amx-tile,amx-int8,"
#else
#define LQ_AMX_TARGET
#endif
#define TARGET                                                                              \
  __attribute__((target(LQ_AMX_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c," \
                                      "prfchw")))
#define INLINE_TARGET __attribute__((always_inline)) inline TARGET

namespace {

constexpr int64_t kBytes = 64;
typedef int32_t Ints __attribute__((vector_size(64), may_alias));
typedef float Floats __attribute__((vector_size(64), may_alias));

// VPDPBUSD multiplies unsigned by signed bytes. Flipping the top bit makes w unsigned and adds kAdded
// to each of its values. The epilogue subtracts what that adds to the sums, the compensation:
//   sum x*(w + 128) - 128 * sum x = sum x*w, in arithmetic modulo 2^32, and so exact.
template <bool int4>
constexpr int kParts = int4 ? 2 : 1;
template <bool int4>
constexpr int kAdded = int4 ? 8 : 128;

// Rows of x in a block of few rows. int4 needs two registers for each row of w, so fewer are left.
template <bool int4>
constexpr int kRows = int4 ? 4 : 6;
// A prepared weight: whether it is faster than the weight as it is stored, registers in a group, and rows
// of x that are multiplied by it together.
#ifdef LQ_AMX
template <bool int4>
constexpr bool kPrepares = false;  // what is prepared has an order that tile registers do not take
#else
template <bool int4>
constexpr bool kPrepares = true;
#endif
constexpr int kGroup = 4;
template <bool int4>
constexpr int kGroupRows = int4 ? 5 : 6;
constexpr int64_t kManyRows = 32;  // from this number of rows on, x is transposed
// Rows of w in a packed slice; bytes of each, at most; bytes from one to the next, so that rows, short
// ones too, spread over all lines of the L1 cache. Bytes of x that are multiplied by a slice, at most: they
// stay in L2.
#ifdef LQ_AMX
constexpr int64_t kSliceColumns = 32, kSliceDepth = 1024, kSliceStride = 1024;
constexpr int64_t kSliceOfX = 1 << 18;
#else
constexpr int64_t kSliceColumns = 16, kSliceDepth = 4096, kSliceStride = kSliceDepth * 3 / 2;
constexpr int64_t kSliceOfX = 1 << 19;
constexpr int kAccumulators = 16;  // registers: 16 rows of w by one panel of x, or 8 by two
#endif

template <bool int4>
INLINE_TARGET Ints Dot(Ints sum, Ints w, Ints x) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
}

// w's values, with kAdded added.
template <bool int4>
INLINE_TARGET void Split(Ints v, Ints* parts) {
  const __m512i bits = _mm512_xor_si512((__m512i)v, _mm512_set1_epi8(int4 ? '\x88' : '\x80'));
  if constexpr (int4) {
    const __m512i low = _mm512_set1_epi8(0x0F);
    parts[1] = (Ints)_mm512_and_si512(_mm512_srli_epi16(bits, 4), low);
    parts[0] = (Ints)_mm512_and_si512(bits, low);
  } else {
    parts[0] = (Ints)bits;
  }
}

// The low four bits of each byte as a number from -8 to 7.
INLINE_TARGET Ints LowNibbles(__m512i v) {
  const __m512i eight = _mm512_set1_epi8(8);
  v = _mm512_xor_si512(_mm512_and_si512(v, _mm512_set1_epi8(0x0F)), eight);
  return (Ints)_mm512_sub_epi8(v, eight);
}

// x's values.
template <bool int4>
INLINE_TARGET void SplitX(Ints v, Ints* parts) {
  parts[0] = v;
  if constexpr (int4) {
    parts[0] = LowNibbles((__m512i)v);
    parts[1] = LowNibbles(_mm512_srli_epi16((__m512i)v, 4));
  }
}

// A register of a row of w in FRACTAL_NZ: its second 32 bytes are `step` bytes after the first.
INLINE_TARGET Ints LoadNz(const uint8_t* w, int64_t step) {
  return (Ints)_mm512_inserti64x4(
      _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w))),
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + step)), 1);
}

// Writes the sums of the lanes of a, b, c and d, in this order, or adds them.
INLINE_TARGET void StoreSums(Ints a_, Ints b_, Ints c_, Ints d_, bool first, int32_t* out) {
  const auto a = (__m512i)a_, b = (__m512i)b_, c = (__m512i)c_, d = (__m512i)d_;
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i all =
      _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half =
      _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  auto* const target = reinterpret_cast<__m128i*>(out);
  if (!first) sums = _mm_add_epi32(sums, _mm_loadu_si128(target));
  _mm_storeu_si128(target, sums);
}

// 16 x 16 words transposed: v[i] gets word i of each.
INLINE_TARGET void Transpose(Ints* words) {
  __m512i v[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = (__m512i)words[i];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
  // v[4i + j] = words j of the four 128-bit lanes of rows 4i to 4i + 3
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    v[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // the same of 4 x 4 lanes
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i even_low = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xDD);
    const __m512i even_high = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xDD);
    words[j] = (Ints)_mm512_shuffle_i32x4(even_low, even_high, 0x88);
    words[4 + j] = (Ints)_mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    words[8 + j] = (Ints)_mm512_shuffle_i32x4(even_low, even_high, 0xDD);
    words[12 + j] = (Ints)_mm512_shuffle_i32x4(odd_low, odd_high, 0xDD);
  }
}

// The even and the odd ones of 32 words.
INLINE_TARGET void LoadPairs(const void* from, Ints* even, Ints* odd) {
  const __m512i a = _mm512_loadu_si512(from);
  const __m512i b = _mm512_loadu_si512(static_cast<const char*>(from) + 64);
  const __m512i evens =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  *even = (Ints)_mm512_permutex2var_epi32(a, evens, b);
  *odd = (Ints)_mm512_permutex2var_epi32(a, _mm512_add_epi32(evens, _mm512_set1_epi32(1)), b);
}

// To whole numbers, half to even.
INLINE_TARGET Floats Round(Floats v) {
  return (Floats)_mm512_roundscale_ps((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// Rounded half to even.
INLINE_TARGET Ints ToInts(Floats v) { return (Ints)_mm512_cvtps_epi32((__m512)v); }

INLINE_TARGET Floats LoadFloat16(const void* from) {
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
}
INLINE_TARGET void StoreFloat16(void* to, Floats v) {
  _mm256_storeu_si256(static_cast<__m256i*>(to),
                      _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// The nearest float16 of each, half to even.
INLINE_TARGET Floats ToFloat16(Floats v) {
  return (Floats)_mm512_cvtph_ps(
      _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// The low 16 bits of each.
INLINE_TARGET void StoreLow16(void* to, Ints v) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)v));
}
INLINE_TARGET void StoreInt8(void* to, Ints v) {  // saturating
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm512_cvtsepi32_epi8((__m512i)v));
}
// The values of a, b, c and d, in this order, as int8; saturating.
INLINE_TARGET Ints ToInt8(Ints a, Ints b, Ints c, Ints d) {
  const __m512i ab = _mm512_packs_epi32((__m512i)a, (__m512i)b);
  const __m512i cd = _mm512_packs_epi32((__m512i)c, (__m512i)d);
  // each 128-bit lane holds four values of each
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return (Ints)_mm512_permutexvar_epi32(order, _mm512_packs_epi16(ab, cd));
}
// The same of int16 values.
INLINE_TARGET Ints ToInt8(Ints ab, Ints cd) {
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  return (Ints)_mm512_permutexvar_epi64(order, _mm512_packs_epi16((__m512i)ab, (__m512i)cd));
}

}  // namespace

#include "by_words.h"

#endif  // LQ_GRAPH_ISA_AVX512_H_
