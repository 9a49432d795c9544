// Epilogue: from int32 sums to the output, by bias, scales, offset, clamp and rounding.
#ifndef LQ_GRAPH_EPILOGUE_H_
#define LQ_GRAPH_EPILOGUE_H_
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "call.h"
#include "geometry.h"
#include "simd.h"
#include "sizes.h"
#include "tile.h"

namespace {

// Scale, offset and bias of kLanes columns.
struct EpilogueColumns {
  int64_t count;  // of columns, at most kLanes
  Ints int_bias, offset;
  Floats scale, float_bias;
};

// kLanes values from element `column` on, or as many as there are; with a stride of 0, one value for all.
template <typename T>
INLINE_TARGET void LoadValues(const void* values, int64_t stride, int64_t column, int64_t count,
                              T* out) {
  const T* const first = static_cast<const T*>(values) + (stride ? column : 0);
  if (count == kLanes && stride) {
    std::memcpy(out, first, kLanes * sizeof(T));
    return;
  }
  for (int64_t i = 0; i < count; ++i) out[i] = first[stride ? i : 0];
}

// Those of the columns from `column` on; `count` of them if that is less than kLanes.
INLINE_TARGET EpilogueColumns LoadColumns(const LqMatmul& call, int64_t column, int64_t count) {
  EpilogueColumns c{std::clamp<int64_t>(count, 0, kLanes), {}, {}, {}, {}};
  const int64_t bytes = 4 * c.count;
  if (call.int_bias) c.int_bias = LoadSome(call.int_bias + column, bytes);
  if (call.float_bias) c.float_bias = (Floats)LoadSome(call.float_bias + column, bytes);
  if (call.output == 0) return c;
  if (call.scale_kind == kPacked) {
    alignas(64) int64_t words[kLanes] = {};
    LoadValues(call.scale, call.scale_stride, column, c.count, words);
    Ints low, high;
    LoadPairs(words, &low, &high);
    c.scale = (Floats)(low & ~0x1FFF);
    c.offset = high << 18 >> 23;  // bits 37 to 45, two's complement
    return c;
  }
  alignas(64) float factors[kLanes] = {}, offsets[kLanes] = {};
  LoadValues(call.scale, call.scale_stride, column, c.count, factors);
  c.scale = LoadFloats(factors);
  if (call.scale_kind == kFolded) {  // what packing and unpacking it would give
    c.scale = (Floats)((Ints)c.scale & ~0x1FFF);
    if (call.offset) {
      LoadValues(call.offset, call.offset_stride, column, c.count, offsets);
      c.offset = ToInts(Clamp(Round(LoadFloats(offsets)), -256, 255));
    }
  }
  return c;
}

// The epilogue of kLanes sums of one row; the first result is element `at` of the output.
INLINE_TARGET void StoreColumns(const LqMatmul& call, const EpilogueColumns& c, Ints sum,
                                int64_t row, int64_t at) {
  sum += c.int_bias;
  if (call.output == 0) {
    int32_t* const to = static_cast<int32_t*>(call.out) + at;
    if (c.count == kLanes)
      Store(to, sum);
    else
      std::memcpy(to, &sum, 4 * c.count);
    return;
  }
  Floats value = ToFloats(sum) * c.scale;
  alignas(64) char some[2 * kLanes];
  const bool whole = c.count == kLanes;
  if (call.output == 1) {
    // the 9-bit clip comes before the offset, rounding before both
    value = Clamp(Round(value), -256, 255);
    int8_t* const to = static_cast<int8_t*>(call.out) + at;
    StoreInt8(whole ? static_cast<void*>(to) : some, ToInts(value) + c.offset);
    if (!whole) std::memcpy(to, some, c.count);
    return;
  }
  if (call.scale_kind != kFloat && call.output == 2) value = Clamp(value, -65504, 65504);
  if (call.pertoken) value *= Set(call.pertoken[row]);
  if (call.float_bias) value += c.float_bias;
  uint16_t* const to = static_cast<uint16_t*>(call.out) + at;
  void* const stored = whole ? static_cast<void*>(to) : some;
  if (call.output == 2)
    StoreFloat16(stored, value);
  else
    StoreLow16(stored, ToBfloat16(value));
  if (!whole) std::memcpy(to, some, 2 * c.count);
}

// The epilogue of a tile; `compensation` is PackedX's, of its rows. It works on lines of kLineColumns:
// rows of the output may be so far apart that L1 drops a line before the loop returns to it.
TARGET void Epilogue(const LqMatmul& call, const int32_t* sums, int64_t stride,
                     const int32_t* compensation, const Tile& tile) {
  constexpr int64_t kAtOnce = std::min(kLineColumns, 2 * kLanes);
  for (int64_t column = tile.left; column < tile.right; column += kAtOnce, sums += kAtOnce) {
    const int64_t count = tile.right - column;
    const EpilogueColumns first = LoadColumns(call, column, count);
    const EpilogueColumns second = LoadColumns(call, column + kLanes, count - kLanes);
    for (int64_t row = tile.top; row < tile.bottom; ++row) {
      const int64_t i = row - tile.top, at = row * call.n + column;
      const Ints more = Set(compensation[i]);
      const int32_t* const sum = sums + i * stride;
      StoreColumns(call, first, Load(sum) - more, row, at);
      if (count > kLanes) StoreColumns(call, second, Load(sum + kLanes) - more, row, at + kLanes);
    }
  }
}

// The epilogue of one panel of x, whose sums are stored column by column: they are transposed first.
TARGET void PanelEpilogue(const LqMatmul& call, const int32_t* sums, int64_t stride,
                          const int32_t* compensation, const Tile& tile) {
  alignas(64) int32_t rows[kPanel * kLineColumns];
  for (int64_t column = 0; column < tile.right - tile.left;
       column += kLanes, sums += kLanes * stride) {
    Ints v[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) v[i] = Load(sums + i * stride);
    Transpose(v);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) Store(rows + i * kLineColumns + column, v[i]);
  }
  Epilogue(call, rows, kLineColumns, compensation, tile);
}

}  // namespace

#endif  // LQ_GRAPH_EPILOGUE_H_
