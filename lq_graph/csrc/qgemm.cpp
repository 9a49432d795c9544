// The CPU kernel of quantized matmul: int8 or packed int4 times the weight as it is stored, (n, k) or
// its FRACTAL_NZ blocks, exact in int32, with LinearQuant's epilogue on the way out. For x86-64 with
// AVX-512 VNNI; elsewhere numerics.py computes the same with torch. Loaded with ctypes, so it knows
// nothing of torch.
//
// VPDPBUSD multiplies unsigned by signed bytes. The weight is made unsigned by flipping its top bit,
// which adds 128 to each value (8 to an int4), and what that adds to the result is taken off again:
//   sum x*(w + 128) - 128 * sum x = sum x*w, in arithmetic modulo 2^32, and so exact.
//
// Threads are those of the OpenMP runtime torch has loaded: this library is not linked to one, and
// finds GOMP_parallel among the symbols of the process. So torch.set_num_threads holds here too.
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>

#define VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c")))
#define INLINE_VNNI __attribute__((always_inline)) inline VNNI

extern "C" {
int omp_get_thread_num();
int omp_get_num_threads();

// One call. Strides count bytes for x and w, elements elsewhere; 0 for a value that holds for all.
struct LqMatmul {
  const uint8_t* x;         // (m, row_bytes)
  const uint8_t* w;         // (n, row_bytes)
  const void* scale;        // float32 or packed int64; unused for int32 output
  const float* pertoken;    // (m) or null
  const int32_t* int_bias;  // (n) or null
  const float* float_bias;  // (n) or null
  void* out;                // (m, n)
  int64_t m, n, row_bytes;  // k bytes for int8, k / 2 for int4
  int64_t x_stride, w_stride, scale_stride;
  // From 32 bytes of a row of w to its next 32. More than 32 where w is FRACTAL_NZ: its w_stride is 32.
  int64_t w_step;
  int32_t int4;
  int32_t packed;  // scale is int64, the offset in it
  int32_t output;  // 0 int32, 1 int8, 2 float16, 3 bfloat16
  int32_t threads;
};
}

namespace {

// Few rows: w is read as it is stored, registers run along k and are summed across at the end.
// Rows of x in one block of registers: what leaves room for those of w, which int4 has two of each.
template <bool int4>
constexpr int kRows = int4 ? 4 : 6;
constexpr int kColumns = 4;       // rows of w, columns of the result
constexpr int64_t kDepth = 4096;  // bytes of w's row at a time: w's rows stay in L1 beside most of x
constexpr int64_t kBlock = 32;    // columns at a time

// Many rows: w is turned, one panel at a time, so that registers run along n and need no sum across.
// Below, turning a weight that is in no cache yet costs more than it saves; sooner for int8 FRACTAL_NZ,
// which comes in halves of a register.
constexpr int64_t kManyRows = 192, kManyRowsNz = 48;
constexpr int kPanelRows = 12;        // rows of x in one block of registers
constexpr int kPanelColumns = 32;     // two registers
constexpr int64_t kPanelDepth = 512;  // values of k at a time: a panel is 16 KB, and stays in L1
constexpr int kAhead = 3;             // lines to fetch ahead with each 64 bytes of a row of w
constexpr int64_t kPanels = 4;        // panels that x, in L2, is multiplied by before it moves on
constexpr int64_t kTall = 768;        // rows at a time: x and the accumulators stay in L2

INLINE_VNNI __mmask64 Mask(int64_t left) {
  return left >= 64 ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
}

// Sums of four accumulators, in order.
INLINE_VNNI __m128i Sums(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i all =
      _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half =
      _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// 64 bytes of a row of w; `step` is w_step.
template <bool nz>
INLINE_VNNI __m512i LoadWeight(const uint8_t* w, int64_t at, int64_t step) {
  if constexpr (!nz) return _mm512_loadu_si512(w + at);
  w += at / 32 * step;
  return _mm512_inserti64x4(
      _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w))),
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + step)), 1);
}

// rows x kColumns results over `depth` bytes of w, a multiple of 64, put into or added to c; what
// will be read next of w is `ahead` bytes further. A row of x has a byte for each of w; for int4 64
// even values, then the 64 odd ones, for each 64 bytes of w. The loops are written out flat: only so
// does GCC 12 keep an array of accumulators in registers.
template <int rows, bool int4, bool nz>
VNNI void Multiply(const int8_t* x, int64_t x_stride, const uint8_t* const* w, int64_t step,
                   int64_t ahead, int64_t depth, bool first, int32_t* c, int64_t c_stride) {
  const __m512i flip = _mm512_set1_epi8(int4 ? '\x88' : '\x80');
  const __m512i low = _mm512_set1_epi8(0x0F);
  const uint8_t *w0 = w[0], *w1 = w[1], *w2 = w[2], *w3 = w[3];
  __m512i sum[rows][kColumns];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) sum[i][j] = _mm512_setzero_si512();
  for (int64_t at = 0; at < depth; at += 64) {
    // into L2 for the next block of columns; the processor looks ahead to the end of a page only
    const int64_t next = ahead + at / 32 * step;
    if constexpr (nz) {  // two rows in a line
      _mm_prefetch(w0 + next, _MM_HINT_T1);
      _mm_prefetch(w2 + next, _MM_HINT_T1);
      _mm_prefetch(w0 + next + step, _MM_HINT_T1);
      _mm_prefetch(w2 + next + step, _MM_HINT_T1);
    } else {
      _mm_prefetch(w0 + next, _MM_HINT_T1);
      _mm_prefetch(w1 + next, _MM_HINT_T1);
      _mm_prefetch(w2 + next, _MM_HINT_T1);
      _mm_prefetch(w3 + next, _MM_HINT_T1);
    }
    __m512i v[kColumns] = {LoadWeight<nz>(w0, at, step), LoadWeight<nz>(w1, at, step),
                           LoadWeight<nz>(w2, at, step), LoadWeight<nz>(w3, at, step)};
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) v[j] = _mm512_xor_si512(v[j], flip);
    if constexpr (int4) {
      __m512i odd[kColumns];
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) {
        odd[j] = _mm512_and_si512(_mm512_srli_epi16(v[j], 4), low);
        v[j] = _mm512_and_si512(v[j], low);
      }
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) {
        const __m512i even_x = _mm512_loadu_si512(x + i * x_stride + 2 * at);
        const __m512i odd_x = _mm512_loadu_si512(x + i * x_stride + 2 * at + 64);
#pragma GCC unroll 8
        for (int j = 0; j < kColumns; ++j) {
          sum[i][j] = _mm512_dpbusd_epi32(sum[i][j], v[j], even_x);
          sum[i][j] = _mm512_dpbusd_epi32(sum[i][j], odd[j], odd_x);
        }
      }
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) {
        const __m512i row = _mm512_loadu_si512(x + i * x_stride + at);
#pragma GCC unroll 8
        for (int j = 0; j < kColumns; ++j) sum[i][j] = _mm512_dpbusd_epi32(sum[i][j], v[j], row);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
    auto* target = reinterpret_cast<__m128i*>(c + i * c_stride);
    __m128i result = Sums(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
    if (!first) result = _mm_add_epi32(result, _mm_loadu_si128(target));
    _mm_storeu_si128(target, result);
  }
}

using Multiplier = void (*)(const int8_t*, int64_t, const uint8_t* const*, int64_t, int64_t, int64_t,
                            bool, int32_t*, int64_t);
template <bool int4, bool nz, int... i>
constexpr std::array<Multiplier, sizeof...(i)> EachHeight(std::integer_sequence<int, i...>) {
  return {Multiply<i + 1, int4, nz>...};
}
// By rows less one.
template <bool int4, bool nz>
constexpr auto kMultiply = EachHeight<int4, nz>(std::make_integer_sequence<int, kRows<int4>>{});

// rows x kPanelColumns results of a turned panel over `steps` times four values of k, put into or
// added to c. x has kPanelRows times four values a step, panel kPanelColumns times four. Meanwhile
// kAhead lines that begin at `ahead`, `line` bytes apart, and those every `next` bytes after, come to
// L2: all of them at once would keep x waiting.
template <int rows>
VNNI void MultiplyPanel(const int8_t* x, const uint8_t* panel, int64_t steps, const uint8_t* ahead,
                        int64_t line, int64_t next, bool first, int32_t* c, int64_t c_stride) {
  __m512i left[rows], right[rows];
#pragma GCC unroll 12
  for (int i = 0; i < rows; ++i) left[i] = right[i] = _mm512_setzero_si512();
  for (; steps; steps -= 16, ahead += next) {
    for (int i = 0; i < kAhead; ++i) _mm_prefetch(ahead + i * line, _MM_HINT_T1);
    for (const uint8_t* end = panel + 16 * 4 * kPanelColumns; panel != end;
         x += 4 * kPanelRows, panel += 4 * kPanelColumns) {
      const __m512i w0 = _mm512_load_si512(panel), w1 = _mm512_load_si512(panel + 64);
#pragma GCC unroll 12
      for (int i = 0; i < rows; ++i) {
        int32_t four;
        std::memcpy(&four, x + 4 * i, 4);
        const __m512i row = _mm512_set1_epi32(four);
        left[i] = _mm512_dpbusd_epi32(left[i], w0, row);
        right[i] = _mm512_dpbusd_epi32(right[i], w1, row);
      }
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < rows; ++i) {
    int32_t* target = c + i * c_stride;
    if (!first) {
      left[i] = _mm512_add_epi32(left[i], _mm512_load_si512(target));
      right[i] = _mm512_add_epi32(right[i], _mm512_load_si512(target + 16));
    }
    _mm512_store_si512(target, left[i]);
    _mm512_store_si512(target + 16, right[i]);
  }
}

using PanelMultiplier = void (*)(const int8_t*, const uint8_t*, int64_t, const uint8_t*, int64_t,
                                 int64_t, bool, int32_t*, int64_t);
template <int... i>
constexpr std::array<PanelMultiplier, sizeof...(i)> EachPanelHeight(
    std::integer_sequence<int, i...>) {
  return {MultiplyPanel<i + 1>...};
}
// By rows less one.
constexpr auto kMultiplyPanel = EachPanelHeight(std::make_integer_sequence<int, kPanelRows>{});

// 16 x 16 words turned over: v[i] gets word i of each.
INLINE_VNNI void Turn(__m512i v[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
  // v[4i + j] = words j of the four 128-bit lanes of rows 4i to 4i + 3
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    v[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // the same of 4 x 4 lanes
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i even_low = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xDD);
    const __m512i even_high = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xDD);
    v[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    v[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    v[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xDD);
    v[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xDD);
  }
}

// Sum of `count` values, a multiple of 64.
VNNI int32_t Sum(const int8_t* x, int64_t count) {
  __m512i sum = _mm512_setzero_si512();
  for (int64_t at = 0; at < count; at += 64)
    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(x + at));
  return _mm512_reduce_add_epi32(sum);
}

// Packed int4 rows as int8: for each 64 bytes the 64 even values, then the 64 odd ones, the end
// filled with zeros.
VNNI void SplitNibbles(const uint8_t* x, int64_t bytes, int8_t* out) {
  const __m512i low = _mm512_set1_epi8(0x0F), eight = _mm512_set1_epi8(8);
  for (int64_t at = 0; at < bytes; at += 64) {
    const __m512i v = _mm512_maskz_loadu_epi8(Mask(bytes - at), x + at);
    const __m512i even = _mm512_xor_si512(_mm512_and_si512(v, low), eight);
    const __m512i odd =
        _mm512_xor_si512(_mm512_and_si512(_mm512_srli_epi16(v, 4), low), eight);
    _mm512_storeu_si512(out + 2 * at, _mm512_sub_epi8(even, eight));
    _mm512_storeu_si512(out + 2 * at + 64, _mm512_sub_epi8(odd, eight));
  }
}

// The low halves of sixteen 64-bit words.
INLINE_VNNI __m512i Low32(__m512i first, __m512i second) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi64_epi32(first)),
                            _mm512_cvtepi64_epi32(second), 1);
}

// Round float32 to bfloat16, half to even, NaN quiet.
INLINE_VNNI __m256i ToBfloat16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7FC0)));
}

// The results of one row, columns [from, from + count), from accumulators to `out`. `surplus` is what
// flipping w added to each.
VNNI void Finish(const LqMatmul& call, const int32_t* sums, int32_t surplus, int64_t row,
                 int64_t from, int64_t count) {
  for (int64_t j = 0; j < count; j += 16) {
    const int64_t column = from + j;
    const __mmask16 mask = count - j >= 16 ? 0xFFFF : (1u << (count - j)) - 1;
    __m512i sum = _mm512_maskz_loadu_epi32(mask, sums + j);
    sum = _mm512_sub_epi32(sum, _mm512_set1_epi32(surplus));
    if (call.int_bias)
      sum = _mm512_add_epi32(sum, _mm512_maskz_loadu_epi32(mask, call.int_bias + column));
    const int64_t at = row * call.n + column;
    if (call.output == 0) {
      _mm512_mask_storeu_epi32(static_cast<int32_t*>(call.out) + at, mask, sum);
      continue;
    }
    __m512 value = _mm512_cvtepi32_ps(sum);
    __m512i offset = _mm512_setzero_si512();
    __m512 scale;
    if (call.packed) {
      __m512i words[2];
      for (int half = 0; half < 2; ++half) {
        const auto* word = static_cast<const int64_t*>(call.scale);
        words[half] = call.scale_stride
                          ? _mm512_maskz_loadu_epi64(mask >> (8 * half), word + column + 8 * half)
                          : _mm512_set1_epi64(*word);
      }
      const __m512i low = Low32(words[0], words[1]);
      scale = _mm512_castsi512_ps(_mm512_and_si512(low, _mm512_set1_epi32(~0x1FFF)));
      // bits 37 to 45, two's complement
      const __m512i high =
          Low32(_mm512_srli_epi64(words[0], 37), _mm512_srli_epi64(words[1], 37));
      offset = _mm512_srai_epi32(_mm512_slli_epi32(high, 23), 23);
    } else {
      const auto* factor = static_cast<const float*>(call.scale);
      scale = call.scale_stride ? _mm512_maskz_loadu_ps(mask, factor + column)
                                : _mm512_set1_ps(*factor);
    }
    value = _mm512_mul_ps(value, scale);
    if (call.output == 1) {
      // the 9-bit clip comes before the offset, rounding before both
      value = _mm512_roundscale_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      value = _mm512_min_ps(_mm512_set1_ps(255), _mm512_max_ps(_mm512_set1_ps(-256), value));
      const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(value), offset);
      _mm_mask_storeu_epi8(static_cast<int8_t*>(call.out) + at, mask,
                           _mm512_cvtsepi32_epi8(whole));
      continue;
    }
    if (call.packed && call.output == 2)
      value = _mm512_min_ps(_mm512_set1_ps(65504), _mm512_max_ps(_mm512_set1_ps(-65504), value));
    if (call.pertoken) value = _mm512_mul_ps(value, _mm512_set1_ps(call.pertoken[row]));
    if (call.float_bias)
      value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, call.float_bias + column));
    const __m256i narrow =
        call.output == 2
            ? _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
            : ToBfloat16(value);
    _mm256_mask_storeu_epi16(static_cast<int16_t*>(call.out) + at, mask, narrow);
  }
}

// Some rows and columns of the result, to be computed by one thread.
struct Part {
  int64_t top, bottom, left, right;
};

// x as it is read. With few rows they end in zeros up to a multiple of 64 bytes of w, and begin 64
// bytes further from one another than that: rows a multiple of 4096 bytes apart would all want the
// same lines of the L1 cache. With many, as MultiplyPanel reads them, a block of rows after another.
struct Left {
  int8_t* x;
  int64_t stride;    // bytes a row
  int32_t* surplus;  // what flipping w adds to each row's results
};

// Where byte `from`, a multiple of 64, of row `row` of w is.
inline const uint8_t* WeightAt(const LqMatmul& call, int64_t row, int64_t from) {
  return call.w + row * call.w_stride + from / 32 * call.w_step;
}

bool IsNz(const LqMatmul& call) { return call.w_step != 32; }

// Products of some rows of x over the bytes [from, from + depth) of some rows of w. The tail, which
// is shorter than 64 bytes, is multiplied as copies that end in zeros.
template <bool int4>
VNNI void Slab(const LqMatmul& call, const Left& left, const Part& part, int64_t from, int64_t depth,
               int32_t* sums) {
  const bool tail = depth < 64;
  const int64_t ahead = tail ? 0 : kBlock * call.w_stride;
  // a copied tail is plain
  const auto& multiply = IsNz(call) && !tail ? kMultiply<int4, true> : kMultiply<int4, false>;
  const int8_t* x = left.x + from * (int4 ? 2 : 1);
  uint8_t copies[kColumns][64] = {};
  // x's rows stay in L1 while w's pass by
  for (int64_t row = part.top; row < part.bottom; row += kRows<int4>) {
    const int64_t rows = std::min<int64_t>(kRows<int4>, part.bottom - row);
    for (int64_t column = part.left; column < part.right; column += kColumns) {
      const uint8_t* w[kColumns];
      for (int64_t i = 0; i < kColumns; ++i) {
        w[i] = WeightAt(call, std::min(column + i, call.n - 1), from);
        if (!tail) continue;
        std::memcpy(copies[i], w[i], std::min<int64_t>(depth, 32));
        if (depth > 32) std::memcpy(copies[i] + 32, w[i] + call.w_step, depth - 32);
        w[i] = copies[i];
      }
      multiply[rows - 1](x + row * left.stride, left.stride, w, call.w_step, ahead,
                         tail ? 64 : depth, from == 0,
                         sums + (row - part.top) * kBlock + column - part.left, kBlock);
    }
  }
}

template <bool int4>
VNNI void FewRows(const LqMatmul& call, const Left& x, const Part& all, int32_t* sums) {
  const int64_t whole = call.row_bytes / 64 * 64;
  for (int64_t left = all.left; left < all.right; left += kBlock) {
    const Part part{all.top, all.bottom, left, std::min(all.right, left + kBlock)};
    for (int64_t from = 0; from < whole; from += kDepth)
      Slab<int4>(call, x, part, from, std::min(kDepth, whole - from), sums);
    if (whole < call.row_bytes)
      Slab<int4>(call, x, part, whole, call.row_bytes - whole, sums);
    for (int64_t row = part.top; row < part.bottom; ++row)
      Finish(call, sums + (row - part.top) * kBlock, x.surplus[row], row, left, part.right - left);
  }
}

// The panel of columns from `column` over the bytes [from, from + depth) of the rows of w, turned and
// flipped: for each step of four values of k, those of each column. Steps are in the order x is in.
template <bool int4>
VNNI void TurnPanel(const LqMatmul& call, int64_t column, int64_t from, int64_t depth,
                    uint8_t* panel) {
  const __m512i flip = _mm512_set1_epi8(int4 ? '\x88' : '\x80');
  const __m512i low = _mm512_set1_epi8(0x0F);
  const bool nz = IsNz(call);
  for (int64_t side = 0; side < kPanelColumns; side += 16) {
    const uint8_t* rows[16];
    for (int64_t i = 0; i < 16; ++i)
      rows[i] = WeightAt(call, std::min(column + side + i, call.n - 1), from);
    uint8_t* out = panel + 4 * side;
    for (int64_t at = 0; at < depth; at += 64) {
      __m512i v[16];
      if (nz) {
        // its rows end in zeros up to a multiple of 32 bytes
        const bool half = depth - at <= 32;
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          v[i] = LoadWeight<true>(rows[i] + at / 32 * call.w_step, 0, half ? 0 : call.w_step);
      } else if (depth - at >= 64) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) v[i] = _mm512_loadu_si512(rows[i] + at);
      } else {
        const __mmask64 mask = Mask(depth - at);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) v[i] = _mm512_maskz_loadu_epi8(mask, rows[i] + at);
      }
      Turn(v);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const __m512i flipped = _mm512_xor_si512(v[i], flip);
        uint8_t* target = out + 4 * kPanelColumns * i;
        if constexpr (int4) {
          _mm512_store_si512(target, _mm512_and_si512(flipped, low));
          _mm512_store_si512(target + 4 * kPanelColumns * 16,
                             _mm512_and_si512(_mm512_srli_epi16(flipped, 4), low));
        } else {
          _mm512_store_si512(target, flipped);
        }
      }
      out += 4 * kPanelColumns * (int4 ? 32 : 16);
    }
  }
}

template <bool int4>
VNNI void ManyRows(const LqMatmul& call, const Left& x, const Part& all, int32_t* sums) {
  constexpr int64_t kBytes = kPanelDepth / (int4 ? 2 : 1), kWide = kPanels * kPanelColumns;
  alignas(64) uint8_t panel[kPanelDepth * kPanelColumns];
  const bool nz = IsNz(call);
  for (int64_t top = all.top; top < all.bottom; top += kTall) {
    const int64_t bottom = std::min(all.bottom, top + kTall);
    for (int64_t left = all.left; left < all.right; left += kWide) {
      const int64_t right = std::min(all.right, left + kWide);
      for (int64_t from = 0; from < call.row_bytes; from += kBytes) {
        const int64_t depth = std::min(kBytes, call.row_bytes - from);
        const int64_t steps = (depth + 63) / 64 * (int4 ? 32 : 16);
        for (int64_t column = left; column < right; column += kPanelColumns) {
          TurnPanel<int4>(call, column, from, depth, panel);
          // what comes next of w; a line of FRACTAL_NZ holds two rows
          const uint8_t* const next = column + kPanelColumns < right
                                          ? WeightAt(call, column + kPanelColumns, from)
                                          : WeightAt(call, left, from + kBytes);
          for (int64_t row = top, line = 0; row < bottom;
               row += kPanelRows, line = (line + kAhead) % kPanelColumns) {
            const uint8_t* const ahead =
                next + (nz ? line / 16 * call.w_step + line % 16 * 64 : line * call.w_stride);
            kMultiplyPanel[std::min<int64_t>(kPanelRows, bottom - row) - 1](
                x.x + row * x.stride + from * (int4 ? 2 : 1) * kPanelRows, panel, steps, ahead,
                nz ? 64 : call.w_stride, 2 * call.w_step, from == 0,
                sums + (row - top) * kWide + column - left, kWide);
          }
        }
      }
      for (int64_t row = top; row < bottom; ++row)
        Finish(call, sums + (row - top) * kWide, x.surplus[row], row, left, right - left);
    }
  }
}

// A block of at most kPanelRows rows, turned: four values of each in turn.
VNNI void TurnRows(const int8_t* block, int64_t height, int64_t padded, int8_t* out) {
  for (int64_t at = 0; at < padded; at += 64) {
    __m512i v[16] = {};
    for (int64_t i = 0; i < height; ++i) v[i] = _mm512_load_si512(block + i * padded + at);
    Turn(v);
    for (int64_t i = 0; i < 16; ++i)
      _mm512_mask_storeu_epi32(out + (at / 4 + i) * 4 * kPanelRows, (1 << kPanelRows) - 1, v[i]);
  }
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <typename T>
using Buffer = std::unique_ptr<T, Free>;
template <typename T>
Buffer<T> Allocate(int64_t count) {
  return Buffer<T>(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 64) / 64 * 64)));
}

// One row of x, padded; returns what flipping w adds to its results.
template <bool int4>
VNNI int32_t Copy(const uint8_t* source, int64_t bytes, int8_t* row, int64_t padded) {
  if constexpr (int4) {
    SplitNibbles(source, bytes, row);
  } else {
    std::memcpy(row, source, bytes);
    std::memset(row + bytes, 0, padded - bytes);
  }
  return (int4 ? 8 : 128) * Sum(row, padded);
}

template <bool int4>
VNNI int Run(const LqMatmul& call) {
  const int64_t m = call.m, n = call.n, threads = call.threads;
  const bool many = m >= (IsNz(call) && !int4 ? kManyRowsNz : kManyRows);
  const int64_t padded = (call.row_bytes + 63) / 64 * 64 * (int4 ? 2 : 1);
  const int64_t stride = many ? padded : padded + 64;
  // panels read whole blocks of rows
  const int64_t blocks = (m + kPanelRows - 1) / kPanelRows;
  const int64_t own_sums = many ? std::min(m, kTall) * kPanels * kPanelColumns : m * kBlock;
  const auto copy = Allocate<int8_t>((many ? blocks * kPanelRows : m) * stride);
  const auto plain = Allocate<int8_t>(many ? threads * kPanelRows * padded : 0);
  const auto surplus = Allocate<int32_t>(m);
  const auto sums = Allocate<int32_t>(threads * own_sums);
  if (!copy || !plain || !surplus || !sums) return 1;
  const Left x{copy.get(), stride, surplus.get()};

  const auto copy_few = [&](int64_t number, int64_t count) {
    for (int64_t i = m * number / count; i < m * (number + 1) / count; ++i)
      x.surplus[i] = Copy<int4>(call.x + i * call.x_stride, call.row_bytes, x.x + i * stride, padded);
  };
  // blocks of rows, four values of each in turn
  const auto copy_many = [&](int64_t number, int64_t count) {
    int8_t* const block = plain.get() + number * kPanelRows * padded;
    for (int64_t top = blocks * number / count * kPanelRows;
         top < std::min(m, blocks * (number + 1) / count * kPanelRows); top += kPanelRows) {
      const int64_t height = std::min<int64_t>(kPanelRows, m - top);
      for (int64_t i = 0; i < height; ++i)
        x.surplus[top + i] = Copy<int4>(call.x + (top + i) * call.x_stride, call.row_bytes,
                                        block + i * padded, padded);
      TurnRows(block, height, padded, x.x + top * stride);
    }
  };
  const auto compute_part = [&](int64_t number, int64_t count) {
    Part own{0, m, 0, n};
    // columns are shared out in sixteens, unless there are too few of them for all threads
    const int64_t groups = (n + 15) / 16;
    if (groups >= count) {
      own.left = groups * number / count * 16;
      own.right = std::min(n, groups * (number + 1) / count * 16);
    } else if (many) {
      own.top = blocks * number / count * kPanelRows;
      own.bottom = std::min(m, blocks * (number + 1) / count * kPanelRows);
    } else {
      own.top = m * number / count;
      own.bottom = m * (number + 1) / count;
    }
    (many ? ManyRows<int4> : FewRows<int4>)(call, x, own, sums.get() + number * own_sums);
  };
  const auto copy_part = [&](int64_t number, int64_t count) {
    many ? copy_many(number, count) : copy_few(number, count);
  };
  if (threads == 1) {
    copy_part(0, 1);
    compute_part(0, 1);
  } else {
#pragma omp parallel num_threads(threads)
    {
      copy_part(omp_get_thread_num(), omp_get_num_threads());
#pragma omp barrier
      compute_part(omp_get_thread_num(), omp_get_num_threads());
    }
  }
  return 0;
}

}  // namespace

extern "C" {

// Whether this processor has what the kernel needs.
int lq_matmul_supported() {
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

// 0, or 1 where there was no memory.
int lq_matmul(const LqMatmul* call) {
  return call->int4 ? Run<true>(*call) : Run<false>(*call);
}
}
