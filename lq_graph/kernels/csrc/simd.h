// Functions of a few vector registers.
#ifndef LQ_GRAPH_SIMD_H_
#define LQ_GRAPH_SIMD_H_
#include <immintrin.h>

#include <cstdint>

#include "call.h"

namespace {

INLINE_VNNI __mmask64 Mask(int64_t left) {
  return left >= 64 ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
}

// The sums of the lanes of a, b, c and d, in this order.
INLINE_VNNI __m128i SumsAcross(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i all =
      _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half =
      _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// 16 x 16 words transposed: v[i] gets word i of each.
INLINE_VNNI void Transpose16x16(__m512i v[16]) {
  __m512i t[16];
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
    v[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    v[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    v[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xDD);
    v[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xDD);
  }
}

// Sum of `count` values, a multiple of 64.
VNNI int32_t SumOfBytes(const int8_t* x, int64_t count) {
  __m512i sum = _mm512_setzero_si512();
  for (int64_t at = 0; at < count; at += 64)
    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(x + at));
  return _mm512_reduce_add_epi32(sum);
}

// The low four bits of each byte as a number from -8 to 7.
INLINE_VNNI __m512i LowNibbles(__m512i v) {
  const __m512i eight = _mm512_set1_epi8(8);
  v = _mm512_xor_si512(_mm512_and_si512(v, _mm512_set1_epi8(0x0F)), eight);
  return _mm512_sub_epi8(v, eight);
}

// Unpacks a row of int4 to int8: for each 64 bytes the 64 even values, then the 64 odd ones. The end is
// filled with zeros.
VNNI void SplitNibbles(const uint8_t* x, int64_t bytes, int8_t* out) {
  for (int64_t at = 0; at < bytes; at += 64) {
    const __m512i v = _mm512_maskz_loadu_epi8(Mask(bytes - at), x + at);
    _mm512_storeu_si512(out + 2 * at, LowNibbles(v));
    _mm512_storeu_si512(out + 2 * at + 64, LowNibbles(_mm512_srli_epi16(v, 4)));
  }
}

// The low 32 bits of sixteen 64-bit words.
INLINE_VNNI __m512i Low32(__m512i first, __m512i second) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi64_epi32(first)),
                            _mm512_cvtepi64_epi32(second), 1);
}

// float32 to bfloat16, rounded half to even; NaN stays NaN, quiet.
INLINE_VNNI __m256i ToBfloat16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7FC0)));
}

}  // namespace

#endif  // LQ_GRAPH_SIMD_H_
