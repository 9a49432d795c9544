// The kernel for many rows of x. It reads x transposed, and w from packed slices: while it multiplies
// one slice it packs the next.
#ifndef LQ_GRAPH_MANY_ROWS_H_
#define LQ_GRAPH_MANY_ROWS_H_
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

// kStep bytes of a packed row of w, in all lanes if they are fewer than a register.
INLINE_TARGET Ints LoadStep(const uint8_t* w) {
  if constexpr (kStep == kBytes) return Load(w);
  int32_t word;
  static_assert(kStep == kBytes || kStep == sizeof(word));
  std::memcpy(&word, w, sizeof(word));
  return Set(word);
}

// panels * kPanel rows by `columns` sums over `blocks` of w. They are written to c (`first`) or added to
// it; c is stored column by column. A step reads kStep bytes of values of kPanel rows of x, the next
// panel is `x_panel` bytes further; w has kSliceDepth bytes for each column.
template <bool int4, int panels, int columns>
TARGET void MultiplySlice(const int8_t* x, int64_t x_panel, const uint8_t* w, int64_t blocks,
                          const PackAhead& pack_ahead, bool first, int32_t* c, int64_t c_stride) {
  // with an odd number of columns and kTogether = 2, those of the last are of no use
  constexpr int kSums = (columns + kTogether - 1) / kTogether * kTogether;
  Ints sum[panels][kSums];
#pragma GCC unroll 2
  for (int i = 0; i < panels; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < kSums; ++j) sum[i][j] = Ints{};
  // Pack-ahead is in the order of memory: block after block of a row, or in FRACTAL_NZ row after row of
  // a block.
  const bool nz = pack_ahead.w_step != 32;
  const int64_t run = nz ? pack_ahead.rows : pack_ahead.blocks;
  const int64_t step = nz ? 32 : kBlock, to_step = nz ? kSliceDepth : kValues<int4>;
  const int64_t next_run = nz ? 2 * pack_ahead.w_step : pack_ahead.row_step;
  const int64_t to_next_run = nz ? kValues<int4> : kSliceDepth;
  const uint8_t* from = pack_ahead.from;
  uint8_t* to = pack_ahead.to;
  int64_t left = run;
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t i = block < pack_ahead.blocks ? pack_ahead.rows : 0; i; --i) {
#pragma GCC unroll 4
      for (int64_t in = 0; in < kBlock; in += kBytes)
        UnpackWeight<int4>(nz ? LoadWeight<true>(from, in, pack_ahead.w_step)
                              : LoadWeight<false>(from, in, 32),
                           in, to);
      for (const uint8_t* next : {from + pack_ahead.to_second, from + pack_ahead.to_third}) {
        __builtin_prefetch(next, 0, 3);
        if (nz) __builtin_prefetch(next + pack_ahead.w_step, 0, 3);
      }
      from += step;
      to += to_step;
      if (--left == 0) {
        left = run;
        from += next_run - run * step;
        to += to_next_run - run * to_step;
      }
    }
    for (const int8_t* end = x + kValues<int4> * kPanel; x != end;
         x += kStep * kPanel, w += kStep) {
      Ints rows[panels][kStep / 4];
#pragma GCC unroll 2
      for (int i = 0; i < panels; ++i)
#pragma GCC unroll 4
        for (int word = 0; word < kStep / 4; ++word)
          rows[i][word] = Load(x + i * x_panel + word * kBytes);
#pragma GCC unroll 16
      for (int j = 0; j < kSums; j += kTogether) {
        Ints columns_of_w[kTogether];
#pragma GCC unroll 2
        for (int i = 0; i < kTogether; ++i)
          columns_of_w[i] = LoadStep(w + (j + i) * kSliceDepth);
#pragma GCC unroll 2
        for (int i = 0; i < panels; ++i) DotStep<int4>(&sum[i][j], columns_of_w, rows[i]);
      }
    }
  }
#pragma GCC unroll 2
  for (int i = 0; i < panels; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < kSums; j += kTogether) OrderSums(&sum[i][j]);
#pragma GCC unroll 16
  for (int j = 0; j < columns; ++j)
#pragma GCC unroll 2
    for (int i = 0; i < panels; ++i) {
      int32_t* target = c + j * c_stride + kPanel * i;
      if (!first) sum[i][j] += Load(target);
      Store(target, sum[i][j]);
    }
}

using SliceKernel = void (*)(const int8_t*, int64_t, const uint8_t*, int64_t, const PackAhead&,
                             bool, int32_t*, int64_t);
template <bool int4, int panels, int... i>
constexpr std::array<SliceKernel, sizeof...(i)> KernelsByColumns(std::integer_sequence<int, i...>) {
  return {MultiplySlice<int4, panels, i + 1>...};
}
// Indexed by columns - 1.
template <bool int4, int panels>
constexpr auto kMultiplySlice =
    KernelsByColumns<int4, panels>(std::make_integer_sequence<int, kAccumulators / panels>{});

// Multiplies the rows of x of a slice's tile by the slice, packed in `w`, into `sums`. Each call of the
// kernel does its part of the pack-ahead, and of the prefetch of the output if this slice completes it.
template <bool int4>
TARGET void MultiplyPanels(const LqMatmul& call, const PackedX& x, const Slice& slice,
                         const uint8_t* w, PackAhead pack_ahead, int32_t* sums) {
  constexpr int64_t kNarrow = kAccumulators / 2;
  const Tile& tile = slice.tile;
  const int64_t height = tile.bottom - tile.top, columns = tile.right - tile.left;
  const int64_t panels = (height + kPanel - 1) / kPanel, pairs = panels / 2;
  const int64_t blocks = (slice.depth + 63) / 64, x_panel = blocks * kValues<int4> * kPanel;
  const int8_t* const rows = x.x + slice.from * kParts<int4> * x.stride + tile.top * blocks * kValues<int4>;
  const int64_t calls = pairs * ((columns + kNarrow - 1) / kNarrow) +
                        panels % 2 * ((columns + kAccumulators - 1) / kAccumulators);
  int64_t left = pack_ahead.rows, number = 0;
  const int64_t each = (left + calls - 1) / calls;
  const auto multiply = [&](int64_t panel, int64_t column, const auto& kernels) {
    if (slice.complete.right)
      PrefetchOutput(call,
                     {tile.top + height * number / calls, tile.top + height * (number + 1) / calls,
                      slice.complete.left, slice.complete.right});
    ++number;
    pack_ahead.rows = std::min(each, left);
    kernels[std::min<int64_t>(kernels.size(), columns - column) - 1](
        rows + panel * x_panel, x_panel, w + column * kSliceDepth, blocks, pack_ahead,
        slice.from == 0, sums + (column * panels + panel) * kPanel, panels * kPanel);
    left -= pack_ahead.rows;
    pack_ahead.from += pack_ahead.rows * pack_ahead.row_step;
    pack_ahead.to += pack_ahead.rows * kSliceDepth;
  };
  // kNarrow columns of w stay in L1 while x's pairs of panels pass by
  for (int64_t column = 0; column < columns; column += kNarrow)
    for (int64_t pair = 0; pair < pairs; ++pair) multiply(2 * pair, column, kMultiplySlice<int4, 2>);
  if (panels % 2)
    for (int64_t column = 0; column < columns; column += kAccumulators)
      multiply(panels - 1, column, kMultiplySlice<int4, 1>);
}

// Bytes of two packed slices of w. They are not on a thread's stack: OMP_STACKSIZE may make it small.
constexpr int64_t kPackedBytes = 2 * kSliceDepth * kSliceColumns;

template <bool int4>
TARGET void ManyRows(const LqMatmul& call, const PackedX& x, TileScheduler* tiles, int64_t thread,
                   uint8_t* slices_of_w, int32_t* sums) {
  uint8_t *w = slices_of_w, *other = slices_of_w + kSliceDepth * kSliceColumns;
  int64_t packed = 0;  // bytes of each row of the slice that are packed already
  Slices<int4> slices(call, tiles, thread);
  Slice slice = slices.Next(), next = slices.Next();
  while (slice.tile.right) {
    const Slice second = slices.Lookahead(0), third = slices.Lookahead(1);
    const Tile& tile = slice.tile;
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
}

}  // namespace

#endif  // LQ_GRAPH_MANY_ROWS_H_
