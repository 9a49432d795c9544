// The vector layer on x86-64 with AVX2, and with AVX-VNNI if LQ_AVXVNNI is defined: 32-byte registers.
// isa/avx512.h tells what each name means.
//
// Without VNNI: VPMADDUBSW saturates for int8, so int8 values are widened to 16 bits, the even and the
// odd bytes apart, for VPMADDWD. For int4 it does not saturate: 2 * 15 * 8 fits.
#ifndef LQ_GRAPH_ISA_AVX2_H_
#define LQ_GRAPH_ISA_AVX2_H_
#include <immintrin.h>

#include <cstdint>

#ifdef LQ_AVXVNNI
#define TARGET __attribute__((target("avx2,avxvnni,f16c,prfchw")))
#else
#define TARGET __attribute__((target("avx2,f16c,prfchw")))
#endif
#define INLINE_TARGET __attribute__((always_inline)) inline TARGET

namespace {

constexpr int64_t kBytes = 32;
typedef int32_t Ints __attribute__((vector_size(32), may_alias));
typedef float Floats __attribute__((vector_size(32), may_alias));

#ifdef LQ_AVXVNNI
template <bool int4>
constexpr int kParts = int4 ? 2 : 1;
template <bool int4>
constexpr int kAdded = int4 ? 8 : 128;
constexpr int kAccumulators = 12;
#else
template <bool int4>
constexpr int kParts = 2;
template <bool int4>
constexpr int kAdded = int4 ? 8 : 0;
constexpr int kAccumulators = 8;
#endif
template <bool int4>
constexpr int kRows = 2;
template <bool int4>
constexpr bool kPrepares =
    kParts<int4> == 1;  // otherwise Split takes what the order of memory saves
constexpr int kGroup = 2;
template <bool int4>
constexpr int kGroupRows = kParts<int4> == 1 ? 6 : 4;
constexpr int64_t kManyRows = 16;
constexpr int64_t kSliceColumns = 16;
constexpr int64_t kSliceDepth = 1024, kSliceStride = 1024;
constexpr int64_t kSliceOfX = 1 << 18;

template <bool int4>
INLINE_TARGET Ints Dot(Ints sum, Ints w, Ints x) {
#ifdef LQ_AVXVNNI
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)x);
#else
  if constexpr (int4)
    return sum + (Ints)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)w, (__m256i)x),
                                         _mm256_set1_epi16(1));
  return sum + (Ints)_mm256_madd_epi16((__m256i)w, (__m256i)x);
#endif
}

template <bool int4>
INLINE_TARGET void Split(Ints v, Ints* parts) {
  const auto bits = (__m256i)v;
  if constexpr (int4) {
    const __m256i low = _mm256_set1_epi8(0x0F),
                  flipped = _mm256_xor_si256(bits, _mm256_set1_epi8('\x88'));
    parts[0] = (Ints)_mm256_and_si256(flipped, low);
    parts[1] = (Ints)_mm256_and_si256(_mm256_srli_epi16(flipped, 4), low);
  } else {
#ifdef LQ_AVXVNNI
    parts[0] = (Ints)_mm256_xor_si256(bits, _mm256_set1_epi8('\x80'));
#else
    parts[0] = (Ints)_mm256_srai_epi16(_mm256_slli_epi16(bits, 8), 8);
    parts[1] = (Ints)_mm256_srai_epi16(bits, 8);
#endif
  }
}

INLINE_TARGET Ints LowNibbles(__m256i v) {
  const __m256i eight = _mm256_set1_epi8(8);
  v = _mm256_xor_si256(_mm256_and_si256(v, _mm256_set1_epi8(0x0F)), eight);
  return (Ints)_mm256_sub_epi8(v, eight);
}

template <bool int4>
INLINE_TARGET void SplitX(Ints v, Ints* parts) {
  if constexpr (int4) {
    parts[0] = LowNibbles((__m256i)v);
    parts[1] = LowNibbles(_mm256_srli_epi16((__m256i)v, 4));
  } else if constexpr (kParts<false> == 1) {
    parts[0] = v;
  } else {
    Split<false>(v, parts);
  }
}

INLINE_TARGET Ints LoadNz(const uint8_t* w, int64_t) {
  return (Ints)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
}

INLINE_TARGET void StoreSums(Ints a, Ints b, Ints c, Ints d, bool first, int32_t* out) {
  const __m256i ab = _mm256_hadd_epi32((__m256i)a, (__m256i)b);
  const __m256i all = _mm256_hadd_epi32(ab, _mm256_hadd_epi32((__m256i)c, (__m256i)d));
  __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  auto* const target = reinterpret_cast<__m128i*>(out);
  if (!first) sums = _mm_add_epi32(sums, _mm_loadu_si128(target));
  _mm_storeu_si128(target, sums);
}

// 8 x 8 words transposed.
INLINE_TARGET void Transpose(Ints* words) {
  __m256i t[8], v[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const auto a = (__m256i)words[2 * i], b = (__m256i)words[2 * i + 1];
    t[2 * i] = _mm256_unpacklo_epi32(a, b);
    t[2 * i + 1] = _mm256_unpackhi_epi32(a, b);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    v[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    v[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    words[i] = (Ints)_mm256_permute2x128_si256(v[i], v[4 + i], 0x20);
    words[4 + i] = (Ints)_mm256_permute2x128_si256(v[i], v[4 + i], 0x31);
  }
}

INLINE_TARGET void LoadPairs(const void* from, Ints* even, Ints* odd) {
  const __m256 a = _mm256_loadu_ps(static_cast<const float*>(from));
  const __m256 b = _mm256_loadu_ps(static_cast<const float*>(from) + 8);
  // within halves: a0 a2 b0 b2, a4 a6 b4 b6
  const auto evens = (__m256i)_mm256_shuffle_ps(a, b, 0x88);
  const auto odds = (__m256i)_mm256_shuffle_ps(a, b, 0xDD);
  *even = (Ints)_mm256_permute4x64_epi64(evens, 0xD8);
  *odd = (Ints)_mm256_permute4x64_epi64(odds, 0xD8);
}

INLINE_TARGET Floats Round(Floats v) {
  return (Floats)_mm256_round_ps((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
INLINE_TARGET Ints ToInts(Floats v) { return (Ints)_mm256_cvtps_epi32((__m256)v); }

INLINE_TARGET Floats LoadFloat16(const void* from) {
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}
INLINE_TARGET void StoreFloat16(void* to, Floats v) {
  _mm_storeu_si128(static_cast<__m128i*>(to),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
INLINE_TARGET Floats ToFloat16(Floats v) {
  return (Floats)_mm256_cvtph_ps(
      _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
INLINE_TARGET void StoreLow16(void* to, Ints v) {
  const __m256i low = _mm256_and_si256((__m256i)v, _mm256_set1_epi32(0xFFFF));
  const __m256i packed = _mm256_packus_epi32(low, low);  // in each half: its four words, twice
  _mm_storeu_si128(static_cast<__m128i*>(to),
                   _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
INLINE_TARGET void StoreInt8(void* to, Ints v) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)v, (__m256i)v), 0x08);
  const __m128i eight = _mm256_castsi256_si128(words);
  _mm_storel_epi64(static_cast<__m128i*>(to), _mm_packs_epi16(eight, eight));
}
INLINE_TARGET Ints ToInt8(Ints a, Ints b, Ints c, Ints d) {
  const __m256i ab = _mm256_packs_epi32((__m256i)a, (__m256i)b);
  const __m256i cd = _mm256_packs_epi32((__m256i)c, (__m256i)d);
  // each 128-bit half holds four values of each
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  return (Ints)_mm256_permutevar8x32_epi32(_mm256_packs_epi16(ab, cd), order);
}
INLINE_TARGET Ints ToInt8(Ints ab, Ints cd) {
  return (Ints)_mm256_permute4x64_epi64(_mm256_packs_epi16((__m256i)ab, (__m256i)cd), 0xD8);
}

}  // namespace

#include "by_words.h"

#endif  // LQ_GRAPH_ISA_AVX2_H_
