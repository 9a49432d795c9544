// The kernel for few rows of x. It reads w as it is stored, which takes longer than the products: so
// memory must never be idle.
#ifndef LQ_GRAPH_FEW_ROWS_H_
#define LQ_GRAPH_FEW_ROWS_H_
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

#include "call.h"
#include "epilogue.h"
#include "pack.h"
#include "prefetch.h"
#include "simd.h"
#include "sizes.h"
#include "tile.h"

namespace {

// rows x kColumns sums over `depth` bytes of w, a multiple of kBlock. They are written to c (`first`) or
// added to it. x is PackedX's. The loops are unrolled completely: otherwise GCC 12 does not keep an
// array of accumulators in registers.
template <int rows, bool int4, bool nz>
TARGET void MultiplyBlock(const int8_t* x, int64_t x_stride, const uint8_t* const* w, int64_t step,
                          const PrefetchRows& prefetch, int64_t depth, bool first, int32_t* c,
                          int64_t c_stride) {
  const uint8_t *w0 = w[0], *w1 = w[1], *w2 = w[2], *w3 = w[3];
  const int64_t prefetched = prefetch.rows;
  Ints sum[rows][kColumns];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) sum[i][j] = Ints{};
  for (int64_t at = 0; at < depth; at += kBlock) {
    const uint8_t* next = prefetch.from + at / 32 * step;
    if (prefetched > 0) Prefetch<nz>(next, step);
    if (prefetched > 1) Prefetch<nz>(next + prefetch.stride, step);
    if (prefetched > 2) Prefetch<nz>(next + 2 * prefetch.stride, step);
    if (prefetched > 2) Prefetch<nz>(next + 3 * prefetch.stride, step);
#pragma GCC unroll 4
    for (int64_t in = 0; in < kBlock; in += kBytes) {
      const Ints v[kColumns] = {LoadWeight<nz>(w0, at + in, step), LoadWeight<nz>(w1, at + in, step),
                                LoadWeight<nz>(w2, at + in, step), LoadWeight<nz>(w3, at + in, step)};
      Ints parts[kColumns][kParts<int4>];
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) Split<int4>(v[j], parts[j]);
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
        for (int part = 0; part < kParts<int4>; ++part) {
          const Ints row = Load(x + i * x_stride + at * kParts<int4> + part * kBlock + in);
#pragma GCC unroll 8
          for (int j = 0; j < kColumns; ++j)
            sum[i][j] = Dot<int4>(sum[i][j], parts[j][part], row);
        }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
    StoreSums(sum[i][0], sum[i][1], sum[i][2], sum[i][3], first, c + i * c_stride);
}

// Adds the products of a register of a row of w and their values of x to sums.
template <bool int4>
INLINE_TARGET Ints AddProducts(Ints sums, const uint8_t* w, const int8_t* x) {
  Ints parts[kParts<int4>];
  Split<int4>(Load(w), parts);
#pragma GCC unroll 2
  for (int part = 0; part < kParts<int4>; ++part)
    sums = Dot<int4>(sums, parts[part], Load(x + part * kBlock));
  return sums;
}

// MultiplyBlock for one row of x and an ND weight that comes from memory: it reads one row of w after
// another, which is the fastest order. The processor prefetches by itself, but not beyond a page, and
// weights of small layers have small pages.
template <bool int4>
TARGET void MultiplyRow(const int8_t* x, int64_t, const uint8_t* const* w, int64_t,
                        const PrefetchRows&, int64_t depth, bool first, int32_t* c, int64_t) {
  Ints sum[kColumns];
  for (int j = 0; j < kColumns; ++j) {
    Ints some[4] = {};  // sums that do not wait for one another
    int64_t at = 0;
    for (; at + 4 * kBlock <= depth; at += 4 * kBlock)
#pragma GCC unroll 4
      for (int64_t i = 0; i < 4; ++i) {
        __builtin_prefetch(w[j] + at + kBlock * i + kRowAhead, 0, 3);
#pragma GCC unroll 4
        for (int64_t in = 0; in < kBlock; in += kBytes)
          some[i] = AddProducts<int4>(some[i], w[j] + at + kBlock * i + in,
                                      x + (at + kBlock * i) * kParts<int4> + in);
      }
    for (; at < depth; at += kBlock)
#pragma GCC unroll 4
      for (int64_t in = 0; in < kBlock; in += kBytes)
        some[0] = AddProducts<int4>(some[0], w[j] + at + in, x + at * kParts<int4> + in);
    sum[j] = some[0] + some[1] + (some[2] + some[3]);
  }
  StoreSums(sum[0], sum[1], sum[2], sum[3], first, c);
}

using RowsKernel = void (*)(const int8_t*, int64_t, const uint8_t* const*, int64_t,
                            const PrefetchRows&, int64_t, bool, int32_t*, int64_t);
template <bool int4, bool nz, int... i>
constexpr std::array<RowsKernel, sizeof...(i)> KernelsByRows(std::integer_sequence<int, i...>) {
  return {MultiplyBlock<i + 1, int4, nz>...};
}
// Indexed by rows - 1.
template <bool int4, bool nz>
constexpr auto kMultiplyBlock =
    KernelsByRows<int4, nz>(std::make_integer_sequence<int, kRows<int4>>{});

// Multiplies all rows of x by a slice, into `sums`, and prefetches the next slice meanwhile.
template <bool int4>
TARGET void MultiplyRows(const LqMatmul& call, const PackedX& packed, const Slice& slice,
                       const Slice& next, int32_t* sums) {
  const Tile& tile = slice.tile;
  const int64_t whole = slice.depth / kBlock * kBlock, tail = slice.depth - whole;
  const int8_t* const x = packed.x + slice.from * kParts<int4>;
  // a block of x's rows stays in L1 while w's rows pass by; the blocks are of equal height
  const int64_t height = tile.bottom - tile.top, count = (height + kRows<int4> - 1) / kRows<int4>;
  const int64_t width = tile.right - tile.left;
  // the more work the present rows need, the further ahead the prefetch
  const int64_t ahead = int4 || count > 1 ? width : kBlockColumns / 4;
  const bool from_memory = call.n * call.row_bytes > kCacheBytes,
             one_row = from_memory && call.m == 1 && !IsNz(call);
  const RowsKernel in_order = MultiplyRow<int4>;
  const RowsKernel* const multiply = one_row      ? &in_order
                                     : IsNz(call) ? kMultiplyBlock<int4, true>.data()
                                                  : kMultiplyBlock<int4, false>.data();
  for (int64_t number = 0; number < count; ++number) {
    const int64_t row = tile.top + height * number / count;
    const int64_t rows = tile.top + height * (number + 1) / count - row;
    // Each block prefetches its part of every kColumns rows of w.
    const int64_t prefetch_from = kColumns * number / count;
    const int64_t prefetch_rows = kColumns * (number + 1) / count - prefetch_from;
    for (int64_t column = 0; column < width; column += kColumns) {
      const uint8_t* w[kColumns];
      for (int64_t i = 0; i < kColumns; ++i)
        w[i] = WeightAt(call, std::min(tile.left + column + i, call.n - 1), slice.from);
      const int8_t* const x_rows = x + row * packed.stride;
      int32_t* const c = sums + (row - tile.top) * kBlockColumns + column;
      if (whole) {
        const int64_t row_ahead = ahead + prefetch_from * ((width + kColumns - 1) / kColumns) +
                                  column / kColumns * prefetch_rows;
        const bool here = row_ahead < width;
        const PrefetchRows prefetch{
            here ? WeightAt(call, tile.left + row_ahead, slice.from)
                 : WeightAt(call, next.tile.left + row_ahead - width, next.from),
            call.w_stride, from_memory && (here || next.tile.right) ? prefetch_rows : 0};
        multiply[rows - 1](x_rows, packed.stride, w, call.w_step, prefetch, whole, slice.from == 0,
                           c, kBlockColumns);
      }
      if (tail) {  // the last bytes of each row, from ND copies that end in zeros
        uint8_t copies[kColumns][kBlock] = {};
        for (int64_t i = 0; i < kColumns; ++i) {
          const uint8_t* const end = w[i] + whole / 32 * call.w_step;
          std::memcpy(copies[i], end, std::min<int64_t>(tail, 32));
          if (tail > 32) std::memcpy(copies[i] + 32, end + call.w_step, tail - 32);
          w[i] = copies[i];
        }
        kMultiplyBlock<int4, false>[rows - 1](x_rows + whole * kParts<int4>, packed.stride, w, 32,
                                              {}, kBlock, slice.depth == tail&& slice.from == 0, c,
                                              kBlockColumns);
      }
    }
  }
}

template <bool int4>
TARGET void FewRows(const LqMatmul& call, const PackedX& x, TileScheduler* tiles, int64_t thread,
                  int32_t* sums) {
  Slices<int4> slices(call, tiles, thread);
  for (Slice slice = slices.Next(); slice.tile.right; slice = slices.Next()) {
    MultiplyRows<int4>(call, x, slice, slices.Lookahead(0), sums);
    if (slice.complete.right)
      Epilogue(call, sums, kBlockColumns, x.compensation + slice.tile.top, slice.complete);
  }
}

}  // namespace

#endif  // LQ_GRAPH_FEW_ROWS_H_
