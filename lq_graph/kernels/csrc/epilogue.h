// Epilogue: from int32 sums to the output, by bias, scales, offset, clamp and rounding.
#ifndef LQ_GRAPH_EPILOGUE_H_
#define LQ_GRAPH_EPILOGUE_H_
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "call.h"
#include "simd.h"
#include "sizes.h"
#include "tile.h"

namespace {

// Scale, offset and bias of sixteen columns.
struct EpilogueColumns {
  __mmask16 mask;
  __m512i int_bias, offset;
  __m512 scale, float_bias;
};

// Those of the columns from `column` on; `count` of them if that is less than sixteen.
INLINE_VNNI EpilogueColumns LoadColumns(const LqMatmul& call, int64_t column, int64_t count) {
  EpilogueColumns c;
  c.mask = count >= 16 ? 0xFFFF : (1u << std::max<int64_t>(count, 0)) - 1;
  c.int_bias = c.offset = _mm512_setzero_si512();
  c.scale = c.float_bias = _mm512_setzero_ps();
  if (call.int_bias) c.int_bias = _mm512_maskz_loadu_epi32(c.mask, call.int_bias + column);
  if (call.float_bias) c.float_bias = _mm512_maskz_loadu_ps(c.mask, call.float_bias + column);
  if (call.output == 0) {
    // no scale
  } else if (call.packed) {
    __m512i words[2];
    for (int half = 0; half < 2; ++half) {
      const auto* word = static_cast<const int64_t*>(call.scale);
      words[half] = call.scale_stride
                        ? _mm512_maskz_loadu_epi64(c.mask >> (8 * half), word + column + 8 * half)
                        : _mm512_set1_epi64(*word);
    }
    const __m512i low = Low32(words[0], words[1]);
    c.scale = _mm512_castsi512_ps(_mm512_and_si512(low, _mm512_set1_epi32(~0x1FFF)));
    // bits 37 to 45, two's complement
    const __m512i high = Low32(_mm512_srli_epi64(words[0], 37), _mm512_srli_epi64(words[1], 37));
    c.offset = _mm512_srai_epi32(_mm512_slli_epi32(high, 23), 23);
  } else {
    const auto* factor = static_cast<const float*>(call.scale);
    c.scale = call.scale_stride ? _mm512_maskz_loadu_ps(c.mask, factor + column)
                                : _mm512_set1_ps(*factor);
  }
  return c;
}

// The epilogue of sixteen sums of one row; the first result is element `at` of the output.
INLINE_VNNI void StoreColumns(const LqMatmul& call, const EpilogueColumns& c, __m512i sum,
                              int64_t row, int64_t at) {
  sum = _mm512_add_epi32(sum, c.int_bias);
  if (call.output == 0) {
    _mm512_mask_storeu_epi32(static_cast<int32_t*>(call.out) + at, c.mask, sum);
    return;
  }
  __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), c.scale);
  if (call.output == 1) {
    // the 9-bit clip comes before the offset, rounding before both
    value = _mm512_roundscale_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    value = _mm512_min_ps(_mm512_set1_ps(255), _mm512_max_ps(_mm512_set1_ps(-256), value));
    const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(value), c.offset);
    _mm_mask_storeu_epi8(static_cast<int8_t*>(call.out) + at, c.mask, _mm512_cvtsepi32_epi8(whole));
    return;
  }
  if (call.packed && call.output == 2)
    value = _mm512_min_ps(_mm512_set1_ps(65504), _mm512_max_ps(_mm512_set1_ps(-65504), value));
  if (call.pertoken) value = _mm512_mul_ps(value, _mm512_set1_ps(call.pertoken[row]));
  if (call.float_bias) value = _mm512_add_ps(value, c.float_bias);
  const __m256i narrow = call.output == 2
                             ? _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
                             : ToBfloat16(value);
  _mm256_mask_storeu_epi16(static_cast<int16_t*>(call.out) + at, c.mask, narrow);
}

// The epilogue of a tile; `compensation` is PackedX's, of its rows. It works on lines of kLineColumns:
// rows of the output may be so far apart that L1 drops a line before the loop returns to it.
VNNI void Epilogue(const LqMatmul& call, const int32_t* sums, int64_t stride,
                   const int32_t* compensation, const Tile& tile) {
  for (int64_t column = tile.left; column < tile.right;
       column += kLineColumns, sums += kLineColumns) {
    const int64_t count = tile.right - column;
    const EpilogueColumns first = LoadColumns(call, column, count);
    const EpilogueColumns second = LoadColumns(call, column + 16, count - 16);
    for (int64_t row = tile.top; row < tile.bottom; ++row) {
      const int64_t i = row - tile.top, at = row * call.n + column;
      const __m512i more = _mm512_set1_epi32(compensation[i]);
      const int32_t* const sum = sums + i * stride;
      StoreColumns(call, first, _mm512_sub_epi32(_mm512_loadu_si512(sum), more), row, at);
      if (count > 16)
        StoreColumns(call, second, _mm512_sub_epi32(_mm512_loadu_si512(sum + 16), more), row,
                     at + 16);
    }
  }
}

// The epilogue of one panel of x, whose sums are stored column by column: they are transposed first.
VNNI void PanelEpilogue(const LqMatmul& call, const int32_t* sums, int64_t stride,
                        const int32_t* compensation, const Tile& tile) {
  alignas(64) int32_t rows[kPanel * kLineColumns];
  for (int64_t column = 0; column < tile.right - tile.left; column += 16, sums += 16 * stride) {
    __m512i v[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) v[i] = _mm512_load_si512(sums + i * stride);
    Transpose16x16(v);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_store_si512(rows + i * kLineColumns + column, v[i]);
  }
  Epilogue(call, rows, kLineColumns, compensation, tile);
}

}  // namespace

#endif  // LQ_GRAPH_EPILOGUE_H_
