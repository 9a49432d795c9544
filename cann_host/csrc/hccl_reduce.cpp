// The arithmetic of collectives.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "hccl.h"

namespace cann_host {
namespace hccl {
namespace {

float FromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

uint32_t ToBits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// Sums and products of two of these are exact enough in float that rounding them once more gives
// the correctly rounded result: a float has more than twice their digits.
struct Half {
  uint16_t bits;
  operator float() const {
    const uint32_t sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7FFFu;
    if (magnitude >= 0x7C00) return FromBits(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
    const float value = std::ldexp(FromBits(magnitude << 13), 112);  // the exponents' biases differ
    return sign ? -value : value;
  }
  static Half Of(float value) {
    const uint32_t bits = ToBits(value), sign = bits >> 16 & 0x8000u;
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return {static_cast<uint16_t>(sign | 0x7E00u)};
    if (magnitude >= 0x477FF000u) return {static_cast<uint16_t>(sign | 0x7C00u)};  // 65520
    if (magnitude < 0x38800000u) {  // below 2^-14: in steps of 2^-24
      const float steps = std::nearbyint(std::ldexp(FromBits(magnitude), 24));
      return {static_cast<uint16_t>(sign | static_cast<uint32_t>(steps))};
    }
    const uint32_t rounded = magnitude + 0xFFFu + (magnitude >> 13 & 1u);
    return {static_cast<uint16_t>(sign | (rounded - 0x38000000u) >> 13)};
  }
};

struct Bfloat {
  uint16_t bits;
  operator float() const { return FromBits(static_cast<uint32_t>(bits) << 16); }
  static Bfloat Of(float value) {
    const uint32_t bits = ToBits(value);
    if (std::isnan(value)) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
    return {static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
  }
};

// The type a step is computed in; integers without a sign, so that they wrap.
template <typename T>
auto Wide(T value) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<std::make_unsigned_t<decltype(value + value)>>(value);
  } else if constexpr (std::is_floating_point_v<T>) {
    return value;
  } else {
    return static_cast<float>(value);
  }
}

template <typename T, typename W>
T Narrow(W value) {
  if constexpr (std::is_arithmetic_v<T>) {
    return static_cast<T>(value);
  } else {
    return T::Of(value);
  }
}

template <typename T>
bool IsNan(T value) {
  if constexpr (std::is_integral_v<T>) {
    return false;
  } else {
    return std::isnan(static_cast<double>(Wide(value)));
  }
}

template <typename T>
bool Less(T a, T b) {
  if constexpr (std::is_arithmetic_v<T>) {
    return a < b;
  } else {
    return static_cast<float>(a) < static_cast<float>(b);
  }
}

template <typename T>
void ReduceAs(int32_t op, uint64_t count, void* total, const void* more) {
  auto* a = static_cast<T*>(total);
  auto* b = static_cast<const T*>(more);
  for (uint64_t i = 0; i < count; ++i) {
    switch (op) {
      case kSum:
        a[i] = Narrow<T>(Wide(a[i]) + Wide(b[i]));
        break;
      case kProd:
        a[i] = Narrow<T>(Wide(a[i]) * Wide(b[i]));
        break;
      case kMax:
        if (IsNan(b[i]) || Less(a[i], b[i])) a[i] = b[i];
        break;
      default:
        if (IsNan(b[i]) || Less(b[i], a[i])) a[i] = b[i];
    }
  }
}

struct Info {
  const char* name;
  size_t width;
  void (*reduce)(int32_t, uint64_t, void*, const void*);
};

Info Find(int32_t dtype) {
  switch (dtype) {
    case kInt8:
      return {"int8", 1, ReduceAs<int8_t>};
    case kInt16:
      return {"int16", 2, ReduceAs<int16_t>};
    case kInt32:
      return {"int32", 4, ReduceAs<int32_t>};
    case kFloat16:
      return {"float16", 2, ReduceAs<Half>};
    case kFloat32:
      return {"float32", 4, ReduceAs<float>};
    case kInt64:
      return {"int64", 8, ReduceAs<int64_t>};
    case kUint64:
      return {"uint64", 8, ReduceAs<uint64_t>};
    case kUint8:
      return {"uint8", 1, nullptr};
    case kUint16:
      return {"uint16", 2, nullptr};
    case kUint32:
      return {"uint32", 4, nullptr};
    case kFloat64:
      return {"float64", 8, ReduceAs<double>};
    case kBfloat16:
      return {"bfloat16", 2, ReduceAs<Bfloat>};
    case kFloat8E4M3:
      return {"float8_e4m3", 1, nullptr};
    case kFloat8E5M2:
      return {"float8_e5m2", 1, nullptr};
    default:
      return {"of an unknown dtype", 0, nullptr};
  }
}

}  // namespace

size_t Width(int32_t dtype) { return Find(dtype).width; }
const char* Name(int32_t dtype) { return Find(dtype).name; }

const char* OpName(int32_t op) {
  static const char* const names[] = {"sum", "prod", "max", "min"};
  return op >= kSum && op <= kMin ? names[op] : "an unknown op";
}

bool CanReduce(const std::string& soc, int32_t dtype, int32_t op) {
  if (op < kSum || op > kMin) return false;
  const bool is_310p = soc.rfind("Ascend310P", 0) == 0, is_950 = soc.rfind("Ascend950", 0) == 0;
  switch (dtype) {
    case kInt8:
    case kInt32:
    case kFloat16:
    case kFloat32:
      return true;
    case kInt16:
      return is_310p ? op == kSum : op != kProd;
    case kBfloat16:
      return !is_310p && op != kProd;
    case kInt64:
      return !is_310p;
    case kUint64:
    case kFloat64:
      return is_950;
    default:
      return false;
  }
}

void Reduce(int32_t dtype, int32_t op, uint64_t count, void* total, const void* more) {
  Find(dtype).reduce(op, count, total, more);
}

}  // namespace hccl
}  // namespace cann_host
