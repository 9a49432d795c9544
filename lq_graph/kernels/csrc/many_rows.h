// The kernel for many rows of x: x is transposed, w copied slice by slice.
#ifndef LQ_GRAPH_MANY_ROWS_H_
#define LQ_GRAPH_MANY_ROWS_H_
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

#include "call.h"
#include "epilogue.h"
#include "pack.h"
#include "prefetch.h"
#include "sizes.h"
#include "tile.h"

namespace {

// panels * 16 rows by `columns` results over `blocks` of 64 bytes of w, put into or added to c, which
// has the rows of a column together. x has 16 rows times four values a step, the next panel `x_panel`
// bytes on; w has kSliceDepth bytes a column.
template <int panels, int columns>
VNNI void MultiplySlice(const int8_t* x, int64_t x_panel, const uint8_t* w, int64_t blocks,
                        const PackAhead& pack_ahead, bool first, int32_t* c, int64_t c_stride) {
  __m512i sum[columns][panels];
#pragma GCC unroll 16
  for (int j = 0; j < columns; ++j)
#pragma GCC unroll 2
    for (int i = 0; i < panels; ++i) sum[j][i] = _mm512_setzero_si512();
  const int64_t values = pack_ahead.unpacking.int4 ? 128 : 64;
  // as they follow in memory: blocks of a row, or rows of a block where w is FRACTAL_NZ
  const bool nz = pack_ahead.w_step != 32;
  const int64_t run = nz ? pack_ahead.rows : pack_ahead.blocks;
  const int64_t step = nz ? 32 : 64, to_step = nz ? kSliceDepth : values;
  const int64_t next_run = nz ? 2 * pack_ahead.w_step : pack_ahead.row_step;
  const int64_t to_next_run = nz ? values : kSliceDepth;
  const uint8_t* from = pack_ahead.from;
  uint8_t* to = pack_ahead.to;
  int64_t left = run;
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t i = block < pack_ahead.blocks ? pack_ahead.rows : 0; i; --i) {
      const __m512i v = nz ? LoadWeight<true>(from, 0, pack_ahead.w_step)
                           : LoadWeight<false>(from, 0, 32);
      for (const uint8_t* next : {from + pack_ahead.after, from + pack_ahead.later}) {
        _mm_prefetch(next, _MM_HINT_T0);
        if (nz) _mm_prefetch(next + pack_ahead.w_step, _MM_HINT_T0);
      }
      UnpackWeight(v, pack_ahead.unpacking, to);
      from += step;
      to += to_step;
      if (--left == 0) {
        left = run;
        from += next_run - run * step;
        to += to_next_run - run * to_step;
      }
    }
    for (const int8_t* end = x + values * kPanel; x != end; x += 4 * kPanel, w += 4) {
      __m512i rows[panels];
#pragma GCC unroll 2
      for (int i = 0; i < panels; ++i) rows[i] = _mm512_load_si512(x + i * x_panel);
#pragma GCC unroll 16
      for (int j = 0; j < columns; ++j) {
        int32_t four;
        std::memcpy(&four, w + j * kSliceDepth, 4);
        const __m512i word = _mm512_set1_epi32(four);
#pragma GCC unroll 2
        for (int i = 0; i < panels; ++i)
          sum[j][i] = _mm512_dpbusd_epi32(sum[j][i], word, rows[i]);
      }
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < columns; ++j)
#pragma GCC unroll 2
    for (int i = 0; i < panels; ++i) {
      int32_t* target = c + j * c_stride + kPanel * i;
      if (!first) sum[j][i] = _mm512_add_epi32(sum[j][i], _mm512_load_si512(target));
      _mm512_store_si512(target, sum[j][i]);
    }
}

using SliceKernel = void (*)(const int8_t*, int64_t, const uint8_t*, int64_t, const PackAhead&,
                                 bool, int32_t*, int64_t);
template <int panels, int... i>
constexpr std::array<SliceKernel, sizeof...(i)> KernelsByColumns(std::integer_sequence<int, i...>) {
  return {MultiplySlice<panels, i + 1>...};
}
// By columns less one.
template <int panels>
constexpr auto kMultiplySlice =
    KernelsByColumns<panels>(std::make_integer_sequence<int, kAccumulators / panels>{});

// The rows of x of a slice's tile by the slice, which is copied to `w`, into `sums`; what is `pack_ahead`
// is shared out over the calls, and so is what of the result will be written after them.
VNNI void MultiplyPanels(const LqMatmul& call, const PackedX& x, const Slice& slice, const uint8_t* w,
                         PackAhead pack_ahead, int32_t* sums) {
  constexpr int64_t kNarrow = kAccumulators / 2;
  const Tile& tile = slice.tile;
  const int64_t values = call.int4 ? 2 : 1;
  const int64_t height = tile.bottom - tile.top, columns = tile.right - tile.left;
  const int64_t panels = (height + kPanel - 1) / kPanel, pairs = panels / 2;
  const int64_t blocks = (slice.depth + 63) / 64, x_panel = blocks * 64 * values * kPanel;
  const int8_t* const rows =
      x.x + slice.from * values * x.stride + tile.top * blocks * 64 * values;
  const int64_t calls = pairs * ((columns + kNarrow - 1) / kNarrow) +
                        panels % 2 * ((columns + kAccumulators - 1) / kAccumulators);
  int64_t left = pack_ahead.rows, number = 0;
  const int64_t each = (left + calls - 1) / calls;
  const auto multiply = [&](int64_t panel, int64_t column, const auto& kernels) {
    if (slice.complete.right)
      PrefetchOutput(call, {tile.top + height * number / calls, tile.top + height * (number + 1) / calls,
                    slice.complete.left, slice.complete.right});
    ++number;
    pack_ahead.rows = std::min(each, left);
    kernels[std::min<int64_t>(kernels.size(), columns - column) - 1](
        rows + panel * x_panel, x_panel, w + column * kSliceDepth, blocks, pack_ahead, slice.from == 0,
        sums + (column * panels + panel) * kPanel, panels * kPanel);
    left -= pack_ahead.rows;
    pack_ahead.from += pack_ahead.rows * pack_ahead.row_step;
    pack_ahead.to += pack_ahead.rows * kSliceDepth;
  };
  // the columns' tile of w stays in L1 while x's pairs of panels pass by
  for (int64_t column = 0; column < columns; column += kNarrow)
    for (int64_t pair = 0; pair < pairs; ++pair) multiply(2 * pair, column, kMultiplySlice<2>);
  if (panels % 2)
    for (int64_t column = 0; column < columns; column += kAccumulators)
      multiply(panels - 1, column, kMultiplySlice<1>);
}

// Bytes of two slices of w, as MultiplySlice reads them. Not on a thread's stack: OMP_STACKSIZE may
// have left it little.
constexpr int64_t kCopies = 2 * kSliceDepth * kSliceColumns;

VNNI void ManyRows(const LqMatmul& call, const PackedX& x, TileScheduler* tiles, int64_t thread,
                   uint8_t* copies, int32_t* sums) {
  uint8_t *w = copies, *other = copies + kSliceDepth * kSliceColumns;
  int64_t copied = 0;  // bytes of each row of the slice that are there already
  Slices slices(call, tiles, thread);
  Slice slice = slices.Next(), next = slices.Next();
  while (slice.tile.right) {
    const Slice after = slices.Lookahead(0), later = slices.Lookahead(1);
    const Tile& tile = slice.tile;
    if (copied < slice.depth) PackSlice(call, slice, copied, w);
    const uint8_t* const from = WeightAt(call, next.tile.left, next.from);
    copied = std::min((slice.depth + 63) / 64, next.depth / 64) * 64;
    const PackAhead pack_ahead{from,
                            other,
                            next.tile.right - next.tile.left,
                            call.w_stride,
                            copied / 64,
                            call.w_step,
                            WeightAt(call, after.tile.left, after.from) - from,
                            WeightAt(call, later.tile.left, later.from) - from,
                            kUnpacking[call.int4]};
    const int64_t panels = (tile.bottom - tile.top + kPanel - 1) / kPanel;
    int32_t* const own = sums + slice.before * panels * kPanel;
    MultiplyPanels(call, x, slice, w, pack_ahead, own);
    if (slice.complete.right) {
      const int32_t* const first = own - (tile.left - slice.complete.left) * panels * kPanel;
      for (int64_t panel = 0; panel < panels; ++panel) {
        Tile written = slice.complete;
        written.top += panel * kPanel;
        written.bottom = std::min(tile.bottom, written.top + kPanel);
        PanelEpilogue(call, first + panel * kPanel, panels * kPanel, x.compensation + written.top, written);
      }
    }
    slice = next;
    next = slices.Next();
    std::swap(w, other);
  }
}

}  // namespace

#endif  // LQ_GRAPH_MANY_ROWS_H_
