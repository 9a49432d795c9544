// The product of a packed slice of w and one or two panels of x, in vector registers.
#ifndef LQ_GRAPH_MULTIPLY_H_
#define LQ_GRAPH_MULTIPLY_H_
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

#include "pack.h"
#include "simd.h"
#include "sizes.h"

namespace {

// panels * kPanel rows by `columns` sums over `blocks` of w. They are written to c (`first`) or added to
// it; c is stored column by column. A step reads four bytes of values of kPanel rows of x, the next panel
// is `x_panel` bytes further; w has kSliceDepth bytes for each column.
template <bool int4, int panels, int columns>
TARGET void MultiplySlice(const int8_t* x, int64_t x_panel, const uint8_t* w, int64_t blocks,
                          const PackAhead& pack_ahead, bool first, int32_t* c, int64_t c_stride) {
  Ints sum[columns][panels];
#pragma GCC unroll 16
  for (int j = 0; j < columns; ++j)
#pragma GCC unroll 2
    for (int i = 0; i < panels; ++i) sum[j][i] = Ints{};
  Packer<int4> packer(pack_ahead);
  for (int64_t block = 0; block < blocks; ++block) {
    packer.PackBlock(block);
    for (const int8_t* end = x + kValues<int4> * kPanel; x != end; x += kBytes, w += 4) {
      Ints rows[panels];
#pragma GCC unroll 2
      for (int i = 0; i < panels; ++i) rows[i] = Load(x + i * x_panel);
#pragma GCC unroll 16
      for (int j = 0; j < columns; ++j) {
        int32_t four;
        std::memcpy(&four, w + j * kSliceDepth, 4);
        const Ints word = Set(four);
#pragma GCC unroll 2
        for (int i = 0; i < panels; ++i) sum[j][i] = Dot<int4>(sum[j][i], word, rows[i]);
      }
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < columns; ++j)
#pragma GCC unroll 2
    for (int i = 0; i < panels; ++i) {
      int32_t* target = c + j * c_stride + kPanel * i;
      if (!first) sum[j][i] += Load(target);
      Store(target, sum[j][i]);
    }
}

// Columns that one call takes with one or two panels, at most.
template <int panels>
constexpr int64_t kColumnsOf = kAccumulators / panels;

using SliceKernel = void (*)(const int8_t*, int64_t, const uint8_t*, int64_t, const PackAhead&,
                             bool, int32_t*, int64_t);
template <bool int4, int panels, int... i>
constexpr std::array<SliceKernel, sizeof...(i)> KernelsByColumns(std::integer_sequence<int, i...>) {
  return {MultiplySlice<int4, panels, i + 1>...};
}
// Indexed by columns - 1.
template <bool int4, int panels>
constexpr auto kMultiplySlice =
    KernelsByColumns<int4, panels>(std::make_integer_sequence<int, kColumnsOf<panels>>{});

template <bool int4, int panels>
SliceKernel KernelFor(int64_t columns) {
  return kMultiplySlice<int4, panels>[std::min(kColumnsOf<panels>, columns) - 1];
}

// What a thread does before its first product, and after the last.
void BeginMultiply() {}
void EndMultiply() {}

}  // namespace

#endif  // LQ_GRAPH_MULTIPLY_H_
