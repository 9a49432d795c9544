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

// kStepBytes bytes of a packed row of w, in all lanes if they are fewer than a register.
INLINE_TARGET Ints LoadStep(const uint8_t* w) {
  if constexpr (kStepBytes == kBytes) return Load(w);
  int32_t word;
  static_assert(kStepBytes == kBytes || kStepBytes == sizeof(word));
  std::memcpy(&word, w, sizeof(word));
  return Set(word);
}

// panels * kPanel rows by `columns` sums over `blocks` of w. They are written to c (`first`) or added to
// it; c is stored column by column. A step reads kStepBytes bytes of values of kPanel rows of x, the next
// panel is `x_panel` bytes further; w has kSliceStride bytes for each column.
template <bool int4, int panels, int columns>
TARGET void MultiplySlice(const int8_t* x, int64_t x_panel, const uint8_t* w, int64_t blocks,
                          const PackAhead& pack_ahead, bool first, int32_t* c, int64_t c_stride) {
  // those beyond `columns` are of no use; the slice has rows of w for them, with any values
  constexpr int kSums = (columns + kTogether - 1) / kTogether * kTogether;
  Ints sum[panels][kSums];
#pragma GCC unroll 2
  for (int i = 0; i < panels; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < kSums; ++j) sum[i][j] = Ints{};
  Packer<int4> packer(pack_ahead);
  for (int64_t block = 0; block < blocks; ++block) {
    packer.PackBlock(block);
    for (const int8_t* end = x + kValues<int4> * kPanel; x != end;
         x += kStepBytes * kPanel, w += kStepBytes) {
      Ints rows[panels][kStepBytes / 4];
#pragma GCC unroll 2
      for (int i = 0; i < panels; ++i)
#pragma GCC unroll 4
        for (int word = 0; word < kStepBytes / 4; ++word)
          rows[i][word] = Load(x + i * x_panel + word * kBytes);
#pragma GCC unroll 16
      for (int j = 0; j < kSums; j += kTogether) {
        Ints columns_of_w[kTogether];
#pragma GCC unroll 4
        for (int i = 0; i < kTogether; ++i) columns_of_w[i] = LoadStep(w + (j + i) * kSliceStride);
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
