// The CPU kernels, compared bit by bit with plain loops, on buffers between unreadable pages.
//
//   native_bounds [NAME [STEP [COUNT [SEED]]]]
//
// NAME is an instruction set, or "all" (the default) for those that this processor has. Every STEP-th
// size of the table of edges is computed (5 by default: each pair of edges is there still), then COUNT
// random calls (2000). Link it with the built library, or with dispatch.cpp and targets/, and
// compile with -fopenmp -ffp-contract=off -fwrapv. Nothing in it depends on the processor.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "call.h"

extern "C" {
const char* lq_targets();
int lq_use(const char* name);
int lq_matmul(const LqMatmul* call, size_t bytes);
int64_t lq_prepared_bytes(const LqMatmul* call, size_t bytes);
int lq_prepare(const LqMatmul* call, size_t bytes, uint8_t* out);
}

namespace {

enum Output { kInt32, kInt8, kFloat16, kBfloat16 };
constexpr int64_t kWidth[] = {4, 1, 2, 2};

[[noreturn]] void Fail(const char* what, const std::string& call) {
  std::printf("%s: %s\n", what, call.c_str());
  std::exit(1);
}

std::mt19937 random_bits;
int64_t Below(int64_t end) { return random_bits() % end; }
float Uniform() { return random_bits() * 0x1p-32f; }

// ---- memory ----

// Memory between two unreadable pages.
class Guarded {
 public:
  explicit Guarded(size_t bytes) {
    const size_t page = sysconf(_SC_PAGESIZE);
    bytes_ = (bytes + page - 1) / page * page;
    void* const all =
        mmap(nullptr, bytes_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) Fail("no memory", "mmap");
    begin_ = static_cast<uint8_t*>(all) + page;
    if (mprotect(begin_, bytes_, PROT_READ | PROT_WRITE)) Fail("no memory", "mprotect");
  }

  // `bytes` that end just before an unreadable page, or else begin just behind one.
  void* Place(size_t bytes, bool at_end) {
    if (bytes > bytes_) Fail("too large", std::to_string(bytes));
    uint8_t* const place = at_end ? begin_ + bytes_ - bytes : begin_;
    std::memset(place, 0xA5, bytes);
    return place;
  }

  template <typename T>
  T* Copy(const std::vector<T>& values, bool at_end) {
    const size_t bytes = values.size() * sizeof(T);
    void* const place = Place(bytes, at_end);
    std::memcpy(place, values.data(), bytes);
    return static_cast<T*>(place);
  }

 private:
  size_t bytes_;
  uint8_t* begin_;
};

// ---- the golden: sums ----

// Rows of int8 values, or of int4 values in pairs, the first of a pair in the low bits.
struct Rows {
  int64_t count, bytes;
  bool int4;
  std::vector<uint8_t> stored = {};
  std::vector<int8_t> values = {};

  // Random ones, or all values the same.
  void Fill(bool random, uint8_t byte) {
    stored.resize(count * bytes);
    for (uint8_t& each : stored) each = random ? random_bits() >> 8 : byte;
  }
  // As rows that overlap in memory.
  void Overlap(int64_t stride) {
    for (int64_t row = 1; row < count; ++row)
      std::copy_n(&stored[(row - 1) * bytes + stride], bytes - stride, &stored[row * bytes]);
  }
  void Unpack() {
    values.clear();
    for (const uint8_t byte : stored) {
      if (!int4) {
        values.push_back(static_cast<int8_t>(byte));
        continue;
      }
      for (const int nibble : {byte & 15, byte >> 4})
        values.push_back(nibble < 8 ? nibble : nibble - 16);
    }
  }
};

// The products of all rows of x and of w over the bytes [from, to) of each row, added to sums.
void AddProducts(const Rows& x, const Rows& w, int64_t from, int64_t to,
                 std::vector<int32_t>* sums) {
  const int64_t per_byte = x.int4 ? 2 : 1, row = x.bytes * per_byte;
  for (int64_t i = 0; i < x.count; ++i)
    for (int64_t j = 0; j < w.count; ++j) {
      const int8_t *a = &x.values[i * row], *b = &w.values[j * row];
      int32_t sum = 0;
      for (int64_t k = from * per_byte; k < to * per_byte; ++k) sum += a[k] * b[k];
      (*sums)[i * w.count + j] += sum;
    }
}

// ---- the golden: epilogue ----

// A kind of epilogue. A scale of every kind is random, from -size to size.
struct Epilogue {
  Output output;
  LqScale scale_kind;
  enum { kEach, kOne } scales;
  enum { kNone, kOffsets, kOneOffset } offset;
  bool pertoken;
  enum { kNoBias, kInt, kReal } bias;
  float size;
};
constexpr float kSpecial = 0;  // scales that are infinite, NaN, subnormal and so on

constexpr Epilogue kEpilogues[] = {
    {kInt32, kFloat, Epilogue::kEach, Epilogue::kNone, false, Epilogue::kNoBias, 1},
    {kInt32, kFloat, Epilogue::kOne, Epilogue::kNone, false, Epilogue::kInt, 1},
    {kInt8, kPacked, Epilogue::kEach, Epilogue::kNone, false, Epilogue::kNoBias, 1e-3f},
    {kInt8, kPacked, Epilogue::kEach, Epilogue::kNone, false, Epilogue::kInt, 1e-2f},
    {kInt8, kPacked, Epilogue::kOne, Epilogue::kNone, false, Epilogue::kNoBias, 1e-3f},
    {kInt8, kFolded, Epilogue::kEach, Epilogue::kNone, false, Epilogue::kNoBias, 1e-2f},
    {kInt8, kFolded, Epilogue::kEach, Epilogue::kOffsets, false, Epilogue::kInt, 1e-3f},
    {kInt8, kFolded, Epilogue::kEach, Epilogue::kOneOffset, false, Epilogue::kNoBias, 1e-3f},
    {kInt8, kFolded, Epilogue::kOne, Epilogue::kOffsets, false, Epilogue::kNoBias, 1e-3f},
    {kInt8, kFolded, Epilogue::kOne, Epilogue::kOneOffset, false, Epilogue::kInt, 1e-2f},
    {kFloat16, kPacked, Epilogue::kEach, Epilogue::kNone, false, Epilogue::kNoBias, 1},
    {kFloat16, kPacked, Epilogue::kOne, Epilogue::kNone, false, Epilogue::kInt, 1e3f},  // clamped
    {kFloat16, kFolded, Epilogue::kEach, Epilogue::kNone, false, Epilogue::kInt, 10},
    {kFloat16, kFolded, Epilogue::kOne, Epilogue::kNone, false, Epilogue::kNoBias, 1e35f},
    {kBfloat16, kPacked, Epilogue::kEach, Epilogue::kNone, false, Epilogue::kInt, 1},
    {kBfloat16, kPacked, Epilogue::kOne, Epilogue::kNone, false, Epilogue::kNoBias, 1},
    {kBfloat16, kFolded, Epilogue::kEach, Epilogue::kNone, false, Epilogue::kNoBias, 1e-3f},
    {kBfloat16, kFloat, Epilogue::kEach, Epilogue::kNone, false, Epilogue::kInt, 1e-3f},
    {kBfloat16, kFloat, Epilogue::kEach, Epilogue::kNone, true, Epilogue::kReal, 1e-3f},
    {kBfloat16, kFloat, Epilogue::kOne, Epilogue::kNone, true, Epilogue::kReal, 1e-3f},
    {kBfloat16, kFloat, Epilogue::kOne, Epilogue::kNone, false, Epilogue::kReal, 1e36f},
    {kBfloat16, kFloat, Epilogue::kEach, Epilogue::kNone, true, Epilogue::kNoBias, kSpecial},
    {kFloat16, kFloat, Epilogue::kEach, Epilogue::kNone, true, Epilogue::kReal, 1e-3f},
    {kFloat16, kFloat, Epilogue::kEach, Epilogue::kNone, true, Epilogue::kNoBias,
     10},  // to infinity
    {kFloat16, kFloat, Epilogue::kOne, Epilogue::kNone, true, Epilogue::kInt, 1e-9f},  // subnormal
    {kFloat16, kFloat, Epilogue::kEach, Epilogue::kNone, false, Epilogue::kInt, kSpecial},
};
constexpr int kKinds = sizeof(kEpilogues) / sizeof(Epilogue);

// What an epilogue reads, as the kernel takes it.
struct Parameters {
  const Epilogue& kind;  // one of kEpilogues
  std::vector<float> scale, offset, pertoken, float_bias;
  std::vector<int64_t> packed;
  std::vector<int32_t> int_bias;

  Parameters(const Epilogue& kind, int64_t m, int64_t n) : kind(kind) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const float special[] = {kInfinity, -kInfinity, NAN, 0.0f, -0.0f, 1e-40f, 3e38f};
    for (int64_t j = 0; j < (kind.scales == Epilogue::kOne ? 1 : n); ++j) {
      scale.push_back(kind.size == kSpecial ? special[Below(7)] : (2 * Uniform() - 1) * kind.size);
      uint32_t bits;
      std::memcpy(&bits, &scale.back(), 4);
      // the kernel reads bits 13 to 31, the scale, and 37 to 45, the offset
      packed.push_back(Below(1 << 14) << 32 << 5 | int64_t(Below(32)) << 32 | bits);
    }
    if (kind.offset)
      for (int64_t j = 0; j < (kind.offset == Epilogue::kOneOffset ? 1 : n); ++j)
        offset.push_back(Below(4) ? Below(1200) / 2.0f - 300 : (Uniform() - 0.5f) * 1e10f);
    for (int64_t i = 0; kind.pertoken && i < m; ++i) pertoken.push_back(Uniform() * 3);
    for (int64_t j = 0; kind.bias && j < n; ++j) {
      int_bias.push_back(Below(20000) - 10000);
      float_bias.push_back(Uniform() * 20 - 10);
    }
  }
};

float Truncated(float scale) {  // to 19 bits
  uint32_t bits;
  std::memcpy(&bits, &scale, 4);
  bits = bits >> 13 << 13;
  std::memcpy(&scale, &bits, 4);
  return scale;
}

// The 16-bit float next to a value, half to even: float16 has mantissa bits 10 and normal exponents from
// -14 on, bfloat16 7 and -126.
uint16_t ToFloat(float value, int mantissa, int least) {
  const int sign = std::signbit(value) ? 0x8000 : 0, infinity = (0x7FFF >> mantissa) << mantissa;
  if (std::isnan(value)) return infinity | 1 << (mantissa - 1);
  if (std::isinf(value)) return sign | infinity;
  if (value == 0) return sign;
  int exponent;
  std::frexp(value, &exponent);
  exponent = std::max(exponent - 1, least);
  // in units of the last bit; the leading one adds 1 to the exponent's bits
  const double units = std::nearbyint(std::ldexp(std::fabs(double(value)), mantissa - exponent));
  return sign | std::min(infinity, ((exponent - least) << mantissa) + int(units));
}

// The output for rows and columns [0, m), [0, n) of sums.
std::vector<uint8_t> Expected(const Parameters& p, const std::vector<int32_t>& sums, int64_t m,
                              int64_t n, int64_t stride) {
  const Epilogue& kind = p.kind;
  const int64_t width = kWidth[kind.output];
  std::vector<uint8_t> out(m * n * width);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      uint8_t* const to = &out[(i * n + j) * width];
      const uint32_t bias = kind.bias == Epilogue::kInt ? p.int_bias[j] : 0;
      const int32_t sum = static_cast<int32_t>(sums[i * stride + j] + bias);
      if (kind.output == kInt32) {
        std::memcpy(to, &sum, 4);
        continue;
      }
      const int64_t column = kind.scales == Epilogue::kOne ? 0 : j;
      float scale = p.scale[column];
      if (kind.scale_kind != kFloat) scale = Truncated(scale);
      float value = static_cast<float>(sum) * scale;
      if (kind.output == kInt8) {
        int offset = 0;
        if (kind.scale_kind == kPacked) offset = p.packed[column] >> 37 & 511;
        if (offset > 255) offset -= 512;
        if (kind.offset) {
          const float given = p.offset[kind.offset == Epilogue::kOneOffset ? 0 : j];
          offset = int(std::clamp(std::nearbyint(given), -256.0f, 255.0f));
        }
        const int nine_bits = int(std::clamp(std::nearbyint(value), -256.0f, 255.0f));
        *to = static_cast<uint8_t>(std::clamp(nine_bits + offset, -128, 127));
        continue;
      }
      if (kind.output == kFloat16 && kind.scale_kind != kFloat)
        value = std::clamp(value, -65504.0f, 65504.0f);
      if (kind.pertoken) value = value * p.pertoken[i];
      if (kind.bias == Epilogue::kReal) value = value + p.float_bias[j];
      const uint16_t bits =
          kind.output == kFloat16 ? ToFloat(value, 10, -14) : ToFloat(value, 7, -126);
      std::memcpy(to, &bits, 2);
    }
  return out;
}

bool AreEqual(const Epilogue& kind, const std::vector<uint8_t>& want, const void* got) {
  if (!std::memcmp(want.data(), got, want.size())) return true;
  if (kWidth[kind.output] != 2) return false;
  const int infinity = kind.output == kFloat16 ? 0x7C00 : 0x7F80;
  for (size_t at = 0; at < want.size(); at += 2) {  // any NaN is as good as another
    uint16_t a, b;
    std::memcpy(&a, &want[at], 2);
    std::memcpy(&b, static_cast<const uint8_t*>(got) + at, 2);
    if (a != b && !((a & 0x7FFF) > infinity && (b & 0x7FFF) > infinity)) return false;
  }
  return true;
}

// ---- calls ----

char present_call[300];

void OnFault(int) {
  constexpr char kText[] = "it touched memory beyond a buffer: ";
  if (write(1, kText, sizeof(kText) - 1) < 0 ||
      write(1, present_call, std::strlen(present_call)) < 0 || write(1, "\n", 1) < 0)
    _exit(2);
  _exit(1);
}

// How the operands lie in memory.
struct Layout {
  bool nz;
  int64_t x_gap, w_gap;  // bytes between rows; negative if they overlap
  bool at_end;           // of each buffer: the end lies at an unreadable page, else the beginning
};

class Caller {
 public:
  // The first m, n rows of x and w, the first `bytes` of each row.
  void Check(const char* name, const Rows& x, const Rows& w, int64_t m, int64_t n, int64_t bytes,
             const Parameters& p, const std::vector<uint8_t>& want, const Layout& layout,
             int threads) {
    const bool end = layout.at_end;
    const Epilogue& kind = p.kind;
    std::snprintf(present_call, sizeof(present_call),
                  "%s m %ld, n %ld, bytes in a row %ld, int4 %d, nz %d, gaps %ld %ld, at_end %d, "
                  "epilogue %d, threads %d",
                  name, long(m), long(n), long(bytes), x.int4, layout.nz, long(layout.x_gap),
                  long(layout.w_gap), end, int(&kind - kEpilogues), threads);
    LqMatmul call{};
    call.x_stride = bytes + layout.x_gap;
    uint8_t* const x_place = static_cast<uint8_t*>(x_.Place((m - 1) * call.x_stride + bytes, end));
    for (int64_t i = 0; i < m; ++i)
      std::memcpy(x_place + i * call.x_stride, &x.stored[i * x.bytes], bytes);
    call.x = x_place;
    call.w_step = layout.nz ? (n + 15) / 16 * 512 : 32;
    call.w_stride = layout.nz ? 32 : bytes + layout.w_gap;
    uint8_t* const w_place = static_cast<uint8_t*>(w_.Place(
        layout.nz ? (bytes + 31) / 32 * call.w_step : (n - 1) * call.w_stride + bytes, end));
    for (int64_t j = 0; j < n; ++j) {
      const uint8_t* const row = &w.stored[j * w.bytes];
      if (!layout.nz) std::memcpy(w_place + j * call.w_stride, row, bytes);
      for (int64_t at = 0; layout.nz && at < bytes; at += 32)
        std::memcpy(w_place + j * 32 + at / 32 * call.w_step, row + at,
                    std::min<int64_t>(32, bytes - at));
    }
    call.w = w_place;
    if (kind.output != kInt32)
      call.scale = kind.scale_kind == kPacked ? static_cast<void*>(scale_.Copy(p.packed, end))
                                              : scale_.Copy(p.scale, end);
    if (kind.offset) call.offset = offset_.Copy(p.offset, end);
    if (kind.pertoken) call.pertoken = pertoken_.Copy(p.pertoken, end);
    if (kind.bias == Epilogue::kInt) call.int_bias = bias_.Copy(p.int_bias, end);
    if (kind.bias == Epilogue::kReal) call.float_bias = bias_.Copy(p.float_bias, end);
    call.out = out_.Place(want.size(), end);
    call.m = m;
    call.n = n;
    call.row_bytes = bytes;
    call.scale_stride = kind.scales == Epilogue::kEach;
    call.offset_stride = kind.offset == Epilogue::kOffsets;
    call.int4 = x.int4;
    call.scale_kind = kind.scale_kind;
    call.output = kind.output;
    call.threads = threads;
    Compute(call, kind, want);
    // with fewer rows it reads w itself
    if (const int64_t size = m < 15 ? 0 : lq_prepared_bytes(&call, sizeof(call))) {
      auto* const prepared = static_cast<uint8_t*>(prepared_.Place(size, end));
      if (lq_prepare(&call, sizeof(call), prepared) != kDone) Fail("not prepared", present_call);
      call.prepared = prepared;
      std::memset(call.out, 0xA5, want.size());
      std::strcat(present_call, ", prepared");
      Compute(call, kind, want);
    }
  }

  int64_t count = 0;

 private:
  void Compute(const LqMatmul& call, const Epilogue& kind, const std::vector<uint8_t>& want) {
    if (lq_matmul(&call, sizeof(call)) != kDone) Fail("not computed", present_call);
    if (!AreEqual(kind, want, call.out)) Fail("wrong", present_call);
    ++count;
  }

  Guarded x_{1 << 23}, w_{1 << 23}, prepared_{1 << 23}, out_{1 << 22}, scale_{1 << 16},
      offset_{1 << 16}, pertoken_{1 << 16}, bias_{1 << 16};
};

// ---- which calls ----

using Sizes = std::vector<int64_t>;
const Sizes kM = {1,  2,  3,  4,  5,  6,  7,  8,  11, 12,  13,  15,  16,  17,  23, 24,
                  25, 31, 32, 33, 47, 48, 49, 63, 65, 128, 255, 256, 257, 300, 600};
const Sizes kN = {1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130, 255, 257, 550};
const Sizes kBytes = {1,   3,   4,    31,   32,   33,   60,   63,   64,   65,   96,   127,
                      128, 129, 1023, 1024, 1025, 1092, 2047, 2048, 2049, 2052, 4100, 4160};
// One row, or one block of rows, has longer slices.
const Sizes kFew = {1, 2, 6, 7}, kLong = {4, 8192, 16383, 16384, 16388, 16448};

// Every step-th combination of the sizes, in all layouts.
void CheckTable(const char* name, const Sizes& ms, const Sizes& ns, const Sizes& lengths,
                size_t step, Caller* caller) {
  int64_t number = 0;
  for (const bool int4 : {false, true}) {
    Rows x{ms.back(), lengths.back(), int4}, w{ns.back(), lengths.back(), int4};
    x.Fill(true, 0);
    w.Fill(true, 0);
    x.Unpack();
    w.Unpack();
    std::vector<int32_t> sums(x.count * w.count);
    int64_t done = 0;
    for (size_t length = 0; length < lengths.size(); ++length) {
      const int64_t bytes = lengths[length];
      if (int4 && bytes % 4) continue;
      AddProducts(x, w, done, bytes, &sums);
      done = bytes;
      for (size_t i = 0; i < ms.size(); ++i)
        for (size_t j = 0; j < ns.size(); ++j) {
          if ((7 * length + 11 * i + 13 * j) % step) continue;
          const int64_t m = ms[i], n = ns[j];
          const Parameters p(kEpilogues[number++ % kKinds], m, n);
          const std::vector<uint8_t> want = Expected(p, sums, m, n, w.count);
          for (const bool at_end : {true, false})
            for (const Layout& layout : {Layout{false, 0, 0, at_end}, Layout{false, 4, 36, at_end},
                                         Layout{true, 0, 0, at_end}})
              caller->Check(name, x, w, m, n, bytes, p, want, layout, number % 7 ? 1 : 3);
        }
    }
  }
}

// An edge, or any size, up to `most`.
int64_t RandomSize(const Sizes& edges, int64_t most) {
  const int64_t size = Below(2) ? edges[Below(edges.size())] : 1 + Below(most);
  return std::min(size, most);
}

void Fuzz(const char* name, int64_t count, Caller* caller) {
  constexpr int64_t kProducts = 1 << 21;  // of a call, so that the plain loops take a few ms
  for (int64_t i = 0; i < count; ++i) {
    const bool int4 = Below(2);
    const int64_t m = RandomSize(kM, Below(2) ? 64 : 600);
    const int64_t n = RandomSize(kN, std::min<int64_t>(600, kProducts / m));
    int64_t bytes = RandomSize(kBytes, std::clamp<int64_t>(kProducts / m / n, 4, 20000));
    if (int4) bytes = (bytes + 3) / 4 * 4;
    Rows x{m, bytes, int4}, w{n, bytes, int4};
    // all of the least, or the largest, values: the largest sums
    const bool random = Below(8);
    x.Fill(random, int4 ? 0x88 : 0x80);
    w.Fill(random, Below(2) ? (int4 ? 0x88 : 0x80) : (int4 ? 0x77 : 0x7F));
    Layout layout{Below(3) == 0, Below(80), Below(80), Below(2) == 0};
    if (Below(8) == 0) {
      layout.x_gap = -Below(bytes + 1);
      x.Overlap(bytes + layout.x_gap);
    }
    if (!layout.nz && Below(8) == 0) {
      layout.w_gap = -Below(bytes + 1);
      w.Overlap(bytes + layout.w_gap);
    }
    x.Unpack();
    w.Unpack();
    std::vector<int32_t> sums(m * n);
    AddProducts(x, w, 0, bytes, &sums);
    const Parameters p(kEpilogues[Below(kKinds)], m, n);
    caller->Check(name, x, w, m, n, bytes, p, Expected(p, sums, m, n, n), layout, 1 + Below(4));
  }
}

// Calls that get no result.
void CheckRefusals() {
  float scale = std::numeric_limits<float>::infinity(), offset = NAN;
  int64_t packed = 0x7F800000;
  const uint8_t operand[64] = {};
  int8_t out = 0;
  LqMatmul call{};
  call.x = call.w = operand;
  call.out = &out;
  call.m = call.n = call.threads = 1;
  call.row_bytes = call.x_stride = call.w_stride = 64;
  call.w_step = 32;
  call.output = kInt8;
  call.scale = &packed;
  call.scale_kind = kPacked;
  if (lq_matmul(&call, sizeof(call) - 8) != kOtherStruct) Fail("taken", "a struct of another size");
  if (lq_matmul(&call, sizeof(call)) != kNotFinite) Fail("taken", "a packed infinity");
  call.scale = &scale;
  call.scale_kind = kFolded;
  if (lq_matmul(&call, sizeof(call)) != kNotFinite) Fail("taken", "a folded infinity");
  scale = 1;
  call.offset = &offset;
  if (lq_matmul(&call, sizeof(call)) != kNotFinite) Fail("taken", "an offset that is NaN");
}

void CheckTarget(const char* name, int64_t step, int64_t count, unsigned seed) {
  if (!lq_use(name)) Fail("this processor does not have it", name);
  Caller caller;
  random_bits.seed(seed);
  CheckRefusals();
  CheckTable(name, kM, kN, kBytes, step, &caller);
  CheckTable(name, kFew, {1, 3, 16, 70}, kLong, 1, &caller);
  const int64_t of_table = caller.count;
  Fuzz(name, count, &caller);
  std::printf("%s: %ld calls of the table, %ld random ones, seed %u\n", name, long(of_table),
              long(caller.count - of_table), seed);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "all";
  const int64_t step = argc > 2 ? std::atol(argv[2]) : 5,
                count = argc > 3 ? std::atol(argv[3]) : 2000;
  const unsigned seed = argc > 4 ? std::atol(argv[4]) : 1;
  std::signal(SIGSEGV, OnFault);
  std::signal(SIGBUS, OnFault);
  if (name != "all") {
    CheckTarget(name.c_str(), step, count, seed);
    return 0;
  }
  std::string targets = lq_targets();  // "amx- avx512vnni+ avx2+"
  for (size_t at = 0; at < targets.size();) {
    const size_t end = std::min(targets.find(' ', at), targets.size());
    if (targets[end - 1] != '-')
      CheckTarget(targets.substr(at, end - 1 - at).c_str(), step, count, seed);
    at = end + 1;
  }
}
