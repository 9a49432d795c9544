// Packing: copies of w and x in the order in which the kernels read them.
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

// Loads 64 bytes of a row of w; `step` is w_step.
template <bool nz>
INLINE_VNNI __m512i LoadWeight(const uint8_t* w, int64_t at, int64_t step) {
  if constexpr (!nz) return _mm512_loadu_si512(w + at);
  w += at / 32 * step;
  return _mm512_inserti64x4(
      _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w))),
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + step)), 1);
}

// Constants that turn 64 bytes of w into unsigned values, 64 of int8 or 128 of int4. They are kept in
// memory, so that they take no registers from the accumulators.
struct Unpacking {
  int32_t flip, low;
  bool int4;
};
constexpr Unpacking kUnpacking[] = {{int32_t(0x80808080), 0, false},
                                    {int32_t(0x88888888), 0x0F0F0F0F, true}};

// Writes 64 bytes of w as unsigned values in the order of x's.
INLINE_VNNI void UnpackWeight(__m512i v, const Unpacking& how, uint8_t* out) {
  v = _mm512_xor_si512(v, _mm512_set1_epi32(how.flip));
  if (how.int4) {
    const __m512i odd = _mm512_srli_epi16(v, 4);
    _mm512_store_si512(out + 64, _mm512_and_si512(odd, _mm512_set1_epi32(how.low)));
    v = _mm512_and_si512(v, _mm512_set1_epi32(how.low));
  }
  _mm512_store_si512(out, v);
}

// Rows of the next slice of w, to be packed while the present one is multiplied: on its own, packing
// would wait for memory.
struct PackAhead {
  const uint8_t* from;
  uint8_t* to;
  int64_t rows, row_step;  // their number, and the bytes from one to the next
  int64_t blocks;          // blocks of 64 bytes in each row
  int64_t w_step;          // as in LqMatmul
  // Bytes from here to the two slices after it, which are prefetched. So each slice is prefetched twice:
  // the processor drops one request in a few hundred.
  int64_t to_second, to_third;
  Unpacking unpacking;
};

// The copy of x. Few rows: each row is padded with zeros to a multiple of 64 bytes of w, and 64 bytes
// more lie between rows, because rows at a distance of a multiple of 4096 bytes would compete for the
// same lines of the L1 cache. Many rows: for each slice of k, its panels, as MultiplySlice reads them.
struct PackedX {
  int8_t* x;
  int64_t stride;         // few rows: bytes from row to row; many rows: bytes for each value of k
  int32_t* compensation;  // for each row, what flipping w's top bit adds to its sums
};

// Packs a slice of w for MultiplySlice, from byte `done` of each row on.
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

// Transposes a panel, kPanel rows of x from `top` on: for each slice of k, and for every four values of
// k in it, those four of each row. Writes the rows' compensation as well.
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

// Copies one row of x, padded; returns its compensation.
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
