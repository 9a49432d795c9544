// The kernel for a weight that was packed beforehand. A register of it holds four bytes of a row of w for
// each of kLanes columns of the result, so neither x nor the sums are transposed, and no lanes are summed.
#ifndef LQ_GRAPH_PREPARED_H_
#define LQ_GRAPH_PREPARED_H_
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

#include "call.h"
#include "epilogue.h"
#include "geometry.h"
#include "pack.h"
#include "prefetch.h"
#include "simd.h"
#include "sizes.h"
#include "tile.h"

namespace {

// A group: kGroup registers for each four bytes of k, one after another in memory, then the next four.
constexpr int64_t kGroupColumns = kGroup * kLanes, kGroupBytes = kGroup * kBytes;
// Bytes of a row of w in a slice: a slice of a group stays in L1 or L2 while the rows of x pass by.
constexpr int64_t kPreparedDepth = 1024;

int64_t GroupStride(const LqMatmul& call) {
  return (call.row_bytes + kBlock - 1) / kBlock * kBlock * kGroupColumns;
}

// Bytes of a prepared weight; 0 if it would not be faster.
int64_t PreparedBytes(const LqMatmul& call) {
  if (!(call.int4 ? kPrepares<true> : kPrepares<false>)) return 0;
  return (call.n + kGroupColumns - 1) / kGroupColumns * GroupStride(call);
}

// Packs one group of w; k and n are filled with zeros.
TARGET void PrepareGroup(const LqMatmul& call, int64_t group, uint8_t* out) {
  for (int64_t at = 0; at < call.row_bytes; at += kBlock)
    for (int64_t in = 0; in < kBlock; in += kBytes, out += kLanes * kGroupBytes)
      for (int64_t one = 0; one < kGroup; ++one) {
        Ints words[kLanes] = {};
        for (int64_t i = 0; i < kLanes; ++i) {
          const int64_t row = group * kGroupColumns + one * kLanes + i;
          const int64_t left = call.row_bytes - at - in;
          if (row >= call.n || left <= 0) continue;
          const uint8_t* const w = WeightAt(call, row, at) + in / 32 * call.w_step + in % 32;
          if (!IsNz(call))
            words[i] = LoadSome(w, left);
          else  // what is behind the end of a row is multiplied by zeros of x
            words[i] = LoadNz(w, left > 32 ? call.w_step : 0);
        }
        Transpose(words);
        for (int64_t i = 0; i < kLanes; ++i) Store(out + i * kGroupBytes + one * kBytes, words[i]);
      }
}

// Whether the prepared weight still is w, at a few places: a write through `weight.data`, which Python does
// not notice, changes most of them.
bool IsPrepared(const LqMatmul& call) {
  constexpr int64_t kPlaces = 8;
  if (call.row_bytes < 4) return true;
  for (int64_t i = 0; i < kPlaces; ++i) {
    const int64_t row = (call.n - 1) * i / (kPlaces - 1);
    const int64_t at = (call.row_bytes / 4 - 1) * (5 * i % kPlaces) / (kPlaces - 1) * 4;
    const uint8_t* const w =
        WeightAt(call, row, at / kBlock * kBlock) + at % kBlock / 32 * call.w_step + at % 32;
    const uint8_t* const word = call.prepared + row / kGroupColumns * GroupStride(call) +
                                at / 4 * kGroupBytes + row % kGroupColumns * 4;
    if (std::memcmp(w, word, 4)) return false;
  }
  return true;
}

// Lines of the next slice, prefetched while this one is multiplied.
struct PrefetchLines {
  const uint8_t* from;
  int64_t lines;  // for each 16 bytes of k
};

// rows x kGroupColumns sums over `blocks` of a group, written to c (`first`) or added to it.
template <int rows, bool int4>
TARGET void MultiplyGroup(const int8_t* x, int64_t x_stride, const uint8_t* w, int64_t blocks,
                          const PrefetchLines& prefetch, bool first, int32_t* c, int64_t c_stride) {
  const uint8_t* next = prefetch.from;
  const int64_t lines = prefetch.lines;
  Ints sum[rows][kGroup];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kGroup; ++j) sum[i][j] = Ints{};
  for (int64_t block = 0; block < blocks; ++block, x += kValues<int4>)
    for (int64_t at = 0; at < kBlock; at += 4, w += kGroupBytes) {
      if (at % 16 == 0)
        for (const uint8_t* const end = next + 64 * lines; next != end; next += 64)
          __builtin_prefetch(next, 0, 3);
      Ints parts[kGroup][kParts<int4>];
#pragma GCC unroll 4
      for (int j = 0; j < kGroup; ++j) Split<int4>(Load(w + j * kBytes), parts[j]);
#pragma GCC unroll 2
      for (int part = 0; part < kParts<int4>; ++part)
#pragma GCC unroll 8
        for (int i = 0; i < rows; ++i) {
          int32_t four;
          std::memcpy(&four, x + i * x_stride + part * kBlock + at, 4);
          const Ints word = Set(four);
#pragma GCC unroll 4
          for (int j = 0; j < kGroup; ++j) sum[i][j] = Dot<int4>(sum[i][j], parts[j][part], word);
        }
    }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kGroup; ++j) {
      int32_t* const target = c + i * c_stride + j * kLanes;
      if (!first) sum[i][j] += Load(target);
      Store(target, sum[i][j]);
    }
}

using GroupKernel = void (*)(const int8_t*, int64_t, const uint8_t*, int64_t, const PrefetchLines&,
                             bool, int32_t*, int64_t);
template <bool int4, int... i>
constexpr std::array<GroupKernel, sizeof...(i)> GroupKernels(std::integer_sequence<int, i...>) {
  return {MultiplyGroup<i + 1, int4>...};
}
// Indexed by rows - 1.
template <bool int4>
constexpr auto kMultiplyGroup =
    GroupKernels<int4>(std::make_integer_sequence<int, kGroupRows<int4>>{});

// Multiplies the tiles of one thread; the columns of a tile are those of one or more groups.
template <bool int4>
TARGET void Prepared(const LqMatmul& call, const PackedX& x, TileScheduler* tiles, int64_t thread,
                     int32_t* sums) {
  const int64_t bytes = (call.row_bytes + kBlock - 1) / kBlock * kBlock;
  const int64_t slices = (bytes + kPreparedDepth - 1) / kPreparedDepth;
  const int64_t most = (bytes / kBlock + slices - 1) / slices * kBlock;
  for (Tile tile = tiles->Next(thread); tile.right; tile = tiles->Next(thread)) {
    const int64_t height = tile.bottom - tile.top;
    const int64_t blocks = (height + kGroupRows<int4> - 1) / kGroupRows<int4>;
    // Lines to prefetch, for each 16 bytes of k of each block of rows: all blocks together prefetch a
    // slice of a group.
    const int64_t lines = (16 / 4 * kGroupBytes / 64 + blocks - 1) / blocks;
    for (int64_t left = tile.left; left < tile.right; left += kGroupColumns) {
      const Tile part{tile.top, tile.bottom, left, std::min(tile.right, left + kGroupColumns)};
      const uint8_t* slice = call.prepared + left / kGroupColumns * GroupStride(call);
      for (int64_t from = 0; from < bytes; from += most) {
        const int64_t depth = std::min(most, bytes - from);
        const uint8_t* const next = slice + depth / 4 * kGroupBytes;
        for (int64_t number = 0; number < blocks; ++number) {  // of equal height
          const int64_t row = height * number / blocks, end = height * (number + 1) / blocks;
          if (from + depth == bytes)
            PrefetchOutput(call, {tile.top + row, tile.top + end, part.left, part.right});
          kMultiplyGroup<int4>[end - row - 1](x.x + (tile.top + row)* x.stride + from* kParts<int4>,
                                              x.stride, slice, depth / kBlock,
                                              {next + number * lines * depth / 16 * 64, lines},
                                              from == 0, sums + row* kGroupColumns, kGroupColumns);
        }
        slice = next;
      }
      Epilogue(call, sums, kGroupColumns, x.compensation + tile.top, part);
    }
  }
}

}  // namespace

#endif  // LQ_GRAPH_PREPARED_H_
