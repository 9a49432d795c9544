// The kernel for many rows of x. It reads x transposed, and w from packed slices: while it multiplies
// one slice it packs the next.
#ifndef LQ_GRAPH_MANY_ROWS_H_
#define LQ_GRAPH_MANY_ROWS_H_
#include <algorithm>
#include <cstdint>
#include <utility>

#include "call.h"
#include "epilogue.h"
#ifdef LQ_AMX
#include "multiply_amx.h"
#else
#include "multiply.h"
#endif
#include "pack.h"
#include "prefetch.h"
#include "sizes.h"
#include "tile.h"

namespace {

// Multiplies the rows of x of a slice's tile by the slice, packed in `w`, into `sums`. Each call of the
// kernel does its part of the pack-ahead, and of the prefetch of the output if this slice completes it.
template <bool int4>
TARGET void MultiplyPanels(const LqMatmul& call, const PackedX& x, const Slice& slice,
                           const uint8_t* w, PackAhead pack_ahead, int32_t* sums) {
  const Tile& tile = slice.tile;
  const int64_t height = tile.bottom - tile.top, columns = tile.right - tile.left;
  const int64_t panels = (height + kPanel - 1) / kPanel, pairs = panels / 2;
  const int64_t blocks = (slice.depth + 63) / 64, x_panel = blocks * kValues<int4> * kPanel;
  const int8_t* const rows =
      x.x + slice.from * kParts<int4> * x.stride + tile.top * blocks * kValues<int4>;
  constexpr int64_t kWide = kColumnsOf<1>, kNarrow = kColumnsOf<2>;
  const int64_t calls =
      pairs * ((columns + kNarrow - 1) / kNarrow) + panels % 2 * ((columns + kWide - 1) / kWide);
  int64_t left = pack_ahead.rows, number = 0;
  const int64_t each = (left + calls - 1) / calls;
  const auto multiply = [&](int64_t panel, int64_t column, SliceKernel kernel) {
    if (slice.complete.right)
      PrefetchOutput(call,
                     {tile.top + height * number / calls, tile.top + height * (number + 1) / calls,
                      slice.complete.left, slice.complete.right});
    ++number;
    pack_ahead.rows = std::min(each, left);
    kernel(rows + panel * x_panel, x_panel, w + column * kSliceStride, blocks, pack_ahead,
           slice.from == 0, sums + (column * panels + panel) * kPanel, panels * kPanel);
    left -= pack_ahead.rows;
    pack_ahead.from += pack_ahead.rows * pack_ahead.row_step;
    pack_ahead.to += pack_ahead.rows * kSliceStride;
  };
  // kNarrow columns of w stay in L1 while x's pairs of panels pass by
  for (int64_t column = 0; column < columns; column += kNarrow)
    for (int64_t pair = 0; pair < pairs; ++pair)
      multiply(2 * pair, column, KernelFor<int4, 2>(columns - column));
  if (panels % 2)
    for (int64_t column = 0; column < columns; column += kWide)
      multiply(panels - 1, column, KernelFor<int4, 1>(columns - column));
}

// Prefetches a byte of each run of a slice: of each row, or in FRACTAL_NZ of each 32 bytes of k. Runs are in
// pages of their own, and a prefetch waits until the address of its page is found. Together they wait
// once; one after another, between products, each stops these.
TARGET void PrefetchPages(const LqMatmul& call, const Slice& slice) {
  const int64_t runs = IsNz(call) ? slice.depth / 32 : slice.tile.right - slice.tile.left;
  const int64_t step = IsNz(call) ? call.w_step : call.w_stride;
  const uint8_t* const from = WeightAt(call, slice.tile.left, slice.from);
  for (int64_t i = 0; i < runs; ++i) __builtin_prefetch(from + i * step, 0, 3);
}

// Bytes of two packed slices of w. They are not on a thread's stack: OMP_STACKSIZE may make it small.
constexpr int64_t kPackedBytes = 2 * kSliceStride * kSliceColumns;

template <bool int4>
TARGET void ManyRows(const LqMatmul& call, const PackedX& x, TileScheduler* tiles, int64_t thread,
                     uint8_t* slices_of_w, int32_t* sums) {
  uint8_t *w = slices_of_w, *other = slices_of_w + kSliceStride * kSliceColumns;
  int64_t packed = 0;  // bytes of each row of the slice that are packed already
  BeginMultiply();
  Slices<int4> slices(call, tiles, thread);
  Slice slice = slices.Next(), next = slices.Next();
  while (slice.tile.right) {
    const Slice second = slices.Lookahead(0), third = slices.Lookahead(1);
    const Tile& tile = slice.tile;
    PrefetchPages(call, third);
    if (packed < slice.depth) PackSlice<int4>(call, slice, packed, w);
    OrderW(w, tile.right - tile.left, (slice.depth + kBlock - 1) / kBlock * kValues<int4>);
    const uint8_t* const from = WeightAt(call, next.tile.left, next.from);
    packed = std::min((slice.depth + kBlock - 1) / kBlock, next.depth / kBlock) * kBlock;
    const PackAhead pack_ahead{from,
                               other,
                               next.tile.right - next.tile.left,
                               call.w_stride,
                               packed / kBlock,
                               call.w_step,
                               WeightAt(call, second.tile.left, second.from) - from,
                               WeightAt(call, third.tile.left, third.from) - from};
    const int64_t panels = (tile.bottom - tile.top + kPanel - 1) / kPanel;
    int32_t* const own = sums + slice.before * panels * kPanel;
    MultiplyPanels<int4>(call, x, slice, w, pack_ahead, own);
    if (slice.complete.right) {
      const int32_t* const first = own - (tile.left - slice.complete.left) * panels * kPanel;
      for (int64_t panel = 0; panel < panels; ++panel) {
        Tile written = slice.complete;
        written.top += panel * kPanel;
        written.bottom = std::min(tile.bottom, written.top + kPanel);
        PanelEpilogue(call, first + panel * kPanel, panels * kPanel, x.compensation + written.top,
                      written);
      }
    }
    slice = next;
    next = slices.Next();
    std::swap(w, other);
  }
  EndMultiply();
}

}  // namespace

#endif  // LQ_GRAPH_MANY_ROWS_H_
