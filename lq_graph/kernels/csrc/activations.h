// Quantized activations: rows of float values to int8 or int4, with a scale for each row (dynamic)
// or with given factors (static). kernels/activations.py has each formula and its source.
#ifndef LQ_GRAPH_ACTIVATIONS_H_
#define LQ_GRAPH_ACTIVATIONS_H_
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "call.h"
#include "simd.h"

namespace {

// The last step of an arithmetic: from a value of x to the number that is rounded.
enum class Steps { kMultiplied, kDivided, kHalf, kStatic };

template <LqFloat dtype>
constexpr int64_t kWidth = dtype == LqFloat::kFloat32 ? 4 : 2;  // bytes

template <LqFloat dtype>
INLINE_TARGET Floats Widen(const void* from) {
  if constexpr (dtype == LqFloat::kFloat16) return LoadFloat16(from);
  if constexpr (dtype == LqFloat::kBfloat16) return LoadBfloat16(from);
  return LoadFloats(from);
}

// kBytes values, in the order in which Narrow takes them.
template <LqFloat dtype>
INLINE_TARGET void WidenBlock(const uint8_t* from, Floats* to) {
  if constexpr (dtype == LqFloat::kBfloat16) {  // the even values and the odd ones
#pragma GCC unroll 2
    for (int i = 0; i < 4; i += 2, from += kBytes) {
      const Ints pairs = Load(from);
      to[i] = (Floats)(pairs << 16);
      to[i + 1] = (Floats)(pairs & ~0xFFFF);
    }
  } else {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, from += kLanes * kWidth<dtype>) to[i] = Widen<dtype>(from);
  }
}

// Whole numbers of 8 bits to int8.
template <LqFloat dtype>
INLINE_TARGET Ints Narrow(const Ints* v) {
  if constexpr (dtype == LqFloat::kBfloat16)
    return ToInt8((v[0] & 0xFFFF) | v[1] << 16, (v[2] & 0xFFFF) | v[3] << 16);
  return ToInt8(v[0], v[1], v[2], v[3]);
}

// The largest magnitude of a row; NaN if there is one. The bits of magnitudes have the order of
// their values, and NaN is above infinity.
template <LqFloat dtype>
INLINE_TARGET float Peak(const uint8_t* row, int64_t k) {
  using Bits = std::conditional_t<dtype == LqFloat::kFloat32, int32_t, int16_t>;
  typedef Bits Words __attribute__((vector_size(kBytes), may_alias));
  constexpr Bits kMagnitude = dtype == LqFloat::kFloat32 ? 0x7FFFFFFF : 0x7FFF;
  constexpr int kSeveral = 4;  // so that the loop does not wait for one register
  Words peaks[kSeveral] = {};
  int64_t left = k * kWidth<dtype>;
  for (; left >= kSeveral * kBytes; row += kSeveral * kBytes, left -= kSeveral * kBytes)
#pragma GCC unroll 4
    for (int i = 0; i < kSeveral; ++i) {
      const Words bits = (Words)Load(row + i * kBytes) & kMagnitude;
      peaks[i] = bits > peaks[i] ? bits : peaks[i];
    }
  for (; left > 0; row += kBytes, left -= kBytes) {
    const Words bits = (Words)LoadSome(row, left) & kMagnitude;
    peaks[0] = bits > peaks[0] ? bits : peaks[0];
  }
#pragma GCC unroll 4
  for (int i = 1; i < kSeveral; ++i) peaks[0] = peaks[i] > peaks[0] ? peaks[i] : peaks[0];
  alignas(64) Bits all[kBytes / sizeof(Bits)];
  Store(all, (Ints)peaks[0]);
#pragma GCC unroll 5
  for (int64_t half = kBytes / sizeof(Bits) / 2; half; half /= 2)
#pragma GCC unroll 16
    for (int64_t i = 0; i < half; ++i) all[i] = std::max(all[i], all[i + half]);
  return Widen<dtype>(all)[0];
}

// The largest quantized value.
INLINE_TARGET float HighOf(const LqQuantize& call) {
  return call.values == LqValues::kInt8 ? 127 : 7;
}

// What a row's values are multiplied or divided by, and its scale.
struct RowStep {
  float factor, scale;
};

INLINE_TARGET RowStep StepOf(const LqQuantize& call, float peak) {
  const float top = HighOf(call);
  const float scale = peak * static_cast<float>(1 / static_cast<double>(top));
  switch (call.arithmetic) {
    case LqArithmetic::kDivide:
      return {scale, scale};
    case LqArithmetic::kStep:
      return {1 / (peak / top), peak / top};
    case LqArithmetic::kReciprocal:
      return {top / peak, 1 / (top / peak)};
    case LqArithmetic::kHalf:
      return {peak <= 1e-12f ? 0 : ToFloat16(Set(top / peak))[0], scale};
    default:
      return {top / peak, scale};
  }
}

// kLanes steps, rounded; if careful, clamped to [low, high], and NaN becomes 0.
template <Steps steps, bool careful>
INLINE_TARGET Ints ToIntegers(Floats v, float low, float high) {
  if constexpr (careful) v = Clamp(v == v ? v : Floats{}, low, high);
  if constexpr (steps != Steps::kHalf) return ToInts(v);
  // halves are rounded away from zero
  return __builtin_convertvector(v + (Floats)(((Ints)v & INT32_MIN) | (Ints)Set(0.5f)), Ints);
}

// Where a row's values are multiplied by factors of their own, and offsets are added.
struct Columns {
  const uint8_t *factor, *offset;  // of dtype, or null
};

// kBytes values from x on, to int8.
template <LqFloat dtype, Steps steps, bool careful>
INLINE_TARGET Ints QuantizeBlock(const uint8_t* x, const Columns& columns, Floats factor,
                                 Floats offset, float low, float high) {
  Floats values[4], factors[4] = {factor, factor, factor, factor},
                    offsets[4] = {offset, offset, offset, offset};
  WidenBlock<dtype>(x, values);
  if (columns.factor) WidenBlock<dtype>(columns.factor, factors);
  if (columns.offset) WidenBlock<dtype>(columns.offset, offsets);
  Ints whole[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    Floats v = steps == Steps::kDivided ? values[i] / factors[i] : values[i] * factors[i];
    if constexpr (steps == Steps::kStatic) v += offsets[i];
    if constexpr (steps == Steps::kHalf)
      v = ToFloat16((dtype == LqFloat::kFloat16 ? values[i] : ToFloat16(values[i])) * factors[i]);
    whole[i] = ToIntegers<steps, careful>(v, low, high);
  }
  return Narrow<dtype>(whole);
}

// kBytes values from -8 to 7, two to a byte, the first one low.
INLINE_TARGET void StoreNibbles(void* to, Ints values) {
  typedef uint16_t Pairs __attribute__((vector_size(kBytes), may_alias));
  typedef uint8_t Bytes __attribute__((vector_size(kBytes / 2), may_alias));
  const Pairs pairs = (Pairs)values;
  const Bytes bytes = __builtin_convertvector((pairs & 0x0F) | (pairs >> 4 & 0xF0), Bytes);
  std::memcpy(to, &bytes, kBytes / 2);
}

// A row of x, to int8 or int4.
template <LqFloat dtype, Steps steps, bool packed, bool careful>
INLINE_TARGET void QuantizeRow(const LqQuantize& call, const uint8_t* x, float step, uint8_t* out) {
  constexpr int64_t kW = kWidth<dtype>;
  const float high = HighOf(call), low = -high - 1;
  const auto* const factors = static_cast<const uint8_t*>(call.factor);
  const auto* const offsets = static_cast<const uint8_t*>(call.offset);
  const bool each = steps == Steps::kStatic && call.factor_stride;
  Columns columns{each ? factors : nullptr, each ? offsets : nullptr};
  Floats factor = Set(step), offset{};
  alignas(64) uint8_t some[3][4 * kBytes] = {}, last[kBytes];
  if (steps == Steps::kStatic && !each) {
    std::memcpy(some[0], factors, kW);
    factor = Set(Widen<dtype>(some[0])[0]);
    if (offsets) std::memcpy(some[1], offsets, kW);
    offset = Set(Widen<dtype>(some[1])[0]);
  }
  int64_t left = call.k;
  for (; left >= kBytes; left -= kBytes, x += kBytes * kW, out += packed ? kBytes / 2 : kBytes) {
    const Ints values = QuantizeBlock<dtype, steps, careful>(x, columns, factor, offset, low, high);
    packed ? StoreNibbles(out, values) : Store(out, values);
    if (columns.factor) columns.factor += kBytes * kW;
    if (columns.offset) columns.offset += kBytes * kW;
  }
  if (!left) return;
  std::memcpy(some[0], x, left * kW);
  for (auto [from, copy] : {std::pair(&columns.factor, some[1]), {&columns.offset, some[2]}})
    if (*from) *from = static_cast<uint8_t*>(std::memcpy(copy, *from, left * kW));
  const Ints values =
      QuantizeBlock<dtype, steps, careful>(some[0], columns, factor, offset, low, high);
  packed ? StoreNibbles(last, values) : Store(last, values);
  std::memcpy(out, last, packed ? left / 2 : left);
}

template <LqFloat dtype, Steps steps, bool packed>
TARGET void QuantizeRowsBy(const LqQuantize& call, int64_t from_row, int64_t to_row) {
  for (int64_t row = from_row; row < to_row; ++row) {
    const uint8_t* const x = static_cast<const uint8_t*>(call.x) + row * call.x_stride;
    uint8_t* const out = static_cast<uint8_t*>(call.out) + row * call.k / (packed ? 2 : 1);
    if constexpr (steps == Steps::kStatic) {
      QuantizeRow<dtype, steps, packed, true>(call, x, 0, out);
    } else {
      const float peak = Peak<dtype>(x, call.k);
      const RowStep step = StepOf(call, peak);
      call.scale[row] = step.scale;
      // With an ordinary peak, factor and scale are normal numbers, in float16 too: no step is more
      // than 127 and what rounding adds.
      const bool is_ordinary = steps == Steps::kHalf
                                   ? dtype == LqFloat::kFloat16 && peak > 0.01f && peak < 65536
                                   : peak > 1e-30f && peak < 1e30f;
      if (is_ordinary)
        QuantizeRow<dtype, steps, packed, false>(call, x, step.factor, out);
      else
        QuantizeRow<dtype, steps, packed, true>(call, x, step.factor, out);
    }
  }
}

template <LqFloat dtype, Steps steps>
TARGET void QuantizeRowsBy(const LqQuantize& call, int64_t from_row, int64_t to_row) {
  call.values == LqValues::kPackedInt4
      ? QuantizeRowsBy<dtype, steps, true>(call, from_row, to_row)
      : QuantizeRowsBy<dtype, steps, false>(call, from_row, to_row);
}

template <LqFloat dtype>
TARGET void QuantizeRowsOf(const LqQuantize& call, int64_t from_row, int64_t to_row) {
  switch (call.arithmetic) {
    case LqArithmetic::kStatic:
      return QuantizeRowsBy<dtype, Steps::kStatic>(call, from_row, to_row);
    case LqArithmetic::kHalf:
      return QuantizeRowsBy<dtype, Steps::kHalf>(call, from_row, to_row);
    case LqArithmetic::kDivide:
      return QuantizeRowsBy<dtype, Steps::kDivided>(call, from_row, to_row);
    default:
      return QuantizeRowsBy<dtype, Steps::kMultiplied>(call, from_row, to_row);
  }
}

// Rows `from_row` to `to_row`, by the thread that calls it.
TARGET void QuantizeRows(const LqQuantize& call, int64_t from_row, int64_t to_row) {
  switch (call.dtype) {
    case LqFloat::kFloat16:
      return QuantizeRowsOf<LqFloat::kFloat16>(call, from_row, to_row);
    case LqFloat::kBfloat16:
      return QuantizeRowsOf<LqFloat::kBfloat16>(call, from_row, to_row);
    default:
      return QuantizeRowsOf<LqFloat::kFloat32>(call, from_row, to_row);
  }
}

}  // namespace

#endif  // LQ_GRAPH_ACTIVATIONS_H_
