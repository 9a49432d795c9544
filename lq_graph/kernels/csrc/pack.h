// Copies of w and x in the order the kernels read them.
#ifndef LQ_GRAPH_PACK_H_
#define LQ_GRAPH_PACK_H_
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "call.h"
#include "simd.h"
#include "sizes.h"
#include "tile.h"

namespace {

// 64 bytes of a row of w; `step` is w_step.
template <bool nz>
INLINE_VNNI __m512i LoadWeight(const uint8_t* w, int64_t at, int64_t step) {
  if constexpr (!nz) return _mm512_loadu_si512(w + at);
  w += at / 32 * step;
  return _mm512_inserti64x4(
      _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w))),
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + step)), 1);
}

// How 64 bytes of a row of w become values in the order x's are in: 64 of int8, 128 of int4. In memory,
// so that the constants take no register from the accumulators.
struct Unpacking {
  int32_t flip, low;
  bool int4;
};
constexpr Unpacking kUnpacking[] = {{int32_t(0x80808080), 0, false},
                                    {int32_t(0x88888888), 0x0F0F0F0F, true}};

INLINE_VNNI void UnpackWeight(__m512i v, const Unpacking& how, uint8_t* out) {
  v = _mm512_xor_si512(v, _mm512_set1_epi32(how.flip));
  if (how.int4) {
    const __m512i odd = _mm512_srli_epi16(v, 4);
    _mm512_store_si512(out + 64, _mm512_and_si512(odd, _mm512_set1_epi32(how.low)));
    v = _mm512_and_si512(v, _mm512_set1_epi32(how.low));
  }
  _mm512_store_si512(out, v);
}

// Rows of w to be copied while others are multiplied: alone, the copy would wait for memory.
struct PackAhead {
  const uint8_t* from;
  uint8_t* to;
  int64_t rows, row_step;  // how many, and from one to the next
  int64_t blocks;          // of 64 bytes in each
  int64_t w_step;          // from 32 bytes of a row to its next
  // The slices that come after it, to be asked for, are so many bytes further. So each is asked for
  // twice: the processor forgets one line in some hundreds.
  int64_t after, later;
  Unpacking unpacking;
};

// x as it is read. With few rows they end in zeros up to a multiple of 64 bytes of w, and begin 64
// bytes further from one another than that: rows a multiple of 4096 bytes apart would all want the
// same lines of the L1 cache. With many, as MultiplySlice reads them: for each slice of k, its panels.
struct PackedX {
  int8_t* x;
  int64_t stride;    // few rows: bytes a row; many: bytes a value of k
  int32_t* compensation;  // what flipping w adds to each row's results
};

// A slice, from byte `done` of each row on, for MultiplySlice.
VNNI void PackSlice(const LqMatmul& call, const Slice& slice, int64_t done, uint8_t* out) {
  const int64_t values = call.int4 ? 2 : 1;
  for (int64_t row = slice.tile.left; row < slice.tile.right; ++row, out += kSliceDepth) {
    const uint8_t* const w = WeightAt(call, row, slice.from);
    for (int64_t at = done; at < slice.depth; at += 64) {
      const int64_t left = slice.depth - at;
      __m512i v;
      if (IsNz(call))  // its rows end in zeros up to a multiple of 32 bytes
        v = LoadWeight<true>(w + at / 32 * call.w_step, 0, left > 32 ? call.w_step : 0);
      else
        v = _mm512_maskz_loadu_epi8(Mask(left), w + at);
      UnpackWeight(v, kUnpacking[call.int4], out + at * values);
    }
  }
}

// A panel of kPanel rows of x from `top`, transposed: for each slice of k, and for each four values of
// k, those of each row.
template <bool int4>
VNNI void PackPanel(const LqMatmul& call, int64_t top, const PackedX& x) {
  constexpr int64_t kValues = int4 ? 2 : 1;
  const int64_t most = SliceBytes(call);
  const __m512i one = _mm512_set1_epi8(1);
  __m512i total = _mm512_setzero_si512();
  for (int64_t from = 0; from < call.row_bytes; from += most) {
    const int64_t depth = std::min(most, call.row_bytes - from);
    int8_t* out = x.x + from * kValues * x.stride + top * ((depth + 63) / 64 * 64 * kValues);
    for (int64_t at = 0; at < depth; at += 64) {
      const __mmask64 mask = Mask(depth - at);
      __m512i halves[kValues][16] = {};
      for (int64_t i = 0; i < std::min(kPanel, call.m - top); ++i) {
        const __m512i v =
            _mm512_maskz_loadu_epi8(mask, call.x + (top + i) * call.x_stride + from + at);
        halves[0][i] = v;
        if constexpr (int4) {
          halves[0][i] = LowNibbles(v);
          halves[1][i] = LowNibbles(_mm512_srli_epi16(v, 4));
        }
      }
      for (auto& half : halves) {
        Transpose16x16(half);
        for (int i = 0; i < 16; ++i, out += 64) {
          _mm512_store_si512(out, half[i]);
          total = _mm512_dpbusd_epi32(total, one, half[i]);
        }
      }
    }
  }
  _mm512_store_si512(x.compensation + top, _mm512_slli_epi32(total, int4 ? 3 : 7));
}

// One row of x, padded; returns what flipping w adds to its results.
template <bool int4>
VNNI int32_t PackRow(const uint8_t* source, int64_t bytes, int8_t* row, int64_t padded) {
  if constexpr (int4) {
    SplitNibbles(source, bytes, row);
  } else {
    std::memcpy(row, source, bytes);
    std::memset(row + bytes, 0, padded - bytes);
  }
  return (int4 ? 8 : 128) * SumOfBytes(row, padded);
}

}  // namespace

#endif  // LQ_GRAPH_PACK_H_
