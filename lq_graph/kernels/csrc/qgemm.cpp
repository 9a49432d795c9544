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
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#define VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,prfchw")))
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

// What lq_matmul answers.
enum Answer : int { kDone = 0, kNoMemory = 1, kNotFinite = 2, kOtherStruct = 3 };

// Few rows: w is read as it is stored, registers run along k and are summed across at the end.
// Rows of x in one block of registers: what leaves room for those of w, which int4 has two of each.
template <bool int4>
constexpr int kRows = int4 ? 4 : 6;
constexpr int kColumns = 4;     // rows of w, columns of the result
constexpr int64_t kBlockColumns = 64;  // columns at a time
constexpr int64_t kCacheBytes = 1 << 20;  // bytes of w that are in a cache, if they have been used
// Bytes of w's rows at a time, for one row of x, for those of one block of registers and for more: x's
// stay in L1 beside them. w is read fastest in its own order, but not where it is read again.
constexpr int64_t kDepthOneRow = 16384, kDepthOneBlock = 4096, kDepthManyBlocks = 2048;

// Many rows: x is transposed, once, so that registers run along m and need no sum across. w is read by
// words of four values, from a copy of a few of its rows that lies close together: rows a multiple of
// 4096 bytes apart would all want the same lines of the L1 cache.
constexpr int64_t kManyRows = 32;
constexpr int64_t kPanel = 16;     // rows of x in a register
constexpr int kAccumulators = 16;  // registers: 16 rows of w by one panel of x, or 8 by two
constexpr int64_t kSliceColumns = 16;      // rows of w in a slice
constexpr int64_t kSliceDepth = 2048;   // values of k in a slice, at most
constexpr int64_t kLineColumns = 32;      // columns written at once: 64 bytes of 16-bit results
// Rows and columns at a time, at most: a slice of x and all accumulators stay in L2.
constexpr int64_t kTileRows = 256, kTileColumns = 256;

INLINE_VNNI __mmask64 Mask(int64_t left) {
  return left >= 64 ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
}

// Sums of four accumulators, in order.
INLINE_VNNI __m128i SumsAcross(__m512i a, __m512i b, __m512i c, __m512i d) {
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

// 64 bytes of a row of w, to be brought to the caches.
template <bool nz>
INLINE_VNNI void Prefetch(const uint8_t* w, int64_t step) {
  _mm_prefetch(w, _MM_HINT_T0);
  if (nz) _mm_prefetch(w + step, _MM_HINT_T0);
}

// Rows of w to be asked for while others are multiplied: none, one, two or four.
struct PrefetchRows {
  const uint8_t* from;
  int64_t stride, rows;
};

// rows x kColumns results over `depth` bytes of w, a multiple of 64, put into or added to c. A row of
// x has a byte for each of w; for int4 64 even values, then the 64 odd ones, for each 64 bytes of w.
// The loops are written out flat: only so does GCC 12 keep an array of accumulators in registers.
template <int rows, bool int4, bool nz>
VNNI void MultiplyBlock(const int8_t* x, int64_t x_stride, const uint8_t* const* w, int64_t step,
                   const PrefetchRows& prefetch, int64_t depth, bool first, int32_t* c,
                   int64_t c_stride) {
  const __m512i flip = _mm512_set1_epi8(int4 ? '\x88' : '\x80');
  const __m512i low = _mm512_set1_epi8(0x0F);
  const uint8_t *w0 = w[0], *w1 = w[1], *w2 = w[2], *w3 = w[3];
  const int64_t asked = prefetch.rows;
  __m512i sum[rows][kColumns];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) sum[i][j] = _mm512_setzero_si512();
  for (int64_t at = 0; at < depth; at += 64) {
    const uint8_t* next = prefetch.from + at / 32 * step;
    if (asked > 0) Prefetch<nz>(next, step);
    if (asked > 1) Prefetch<nz>(next + prefetch.stride, step);
    if (asked > 2) Prefetch<nz>(next + 2 * prefetch.stride, step);
    if (asked > 2) Prefetch<nz>(next + 3 * prefetch.stride, step);
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
    __m128i result = SumsAcross(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
    if (!first) result = _mm_add_epi32(result, _mm_loadu_si128(target));
    _mm_storeu_si128(target, result);
  }
}

// Products of 64 bytes of a row of w and the values of x they meet, added to sums.
template <bool int4>
INLINE_VNNI __m512i AddProducts(__m512i sums, const uint8_t* w, const int8_t* x) {
  const __m512i v =
      _mm512_xor_si512(_mm512_loadu_si512(w), _mm512_set1_epi8(int4 ? '\x88' : '\x80'));
  if constexpr (!int4) return _mm512_dpbusd_epi32(sums, v, _mm512_loadu_si512(x));
  const __m512i low = _mm512_set1_epi8(0x0F), odd = _mm512_srli_epi16(v, 4);
  sums = _mm512_dpbusd_epi32(sums, _mm512_and_si512(v, low), _mm512_loadu_si512(x));
  return _mm512_dpbusd_epi32(sums, _mm512_and_si512(odd, low), _mm512_loadu_si512(x + 64));
}

// MultiplyBlock for one row of x and a w that is not FRACTAL_NZ and comes from memory: one row of w after
// another, as memory is read the fastest, and nothing is asked for, for the processor looks ahead by
// itself.
template <bool int4>
VNNI void MultiplyRow(const int8_t* x, int64_t, const uint8_t* const* w, int64_t, const PrefetchRows&,
                      int64_t depth, bool first, int32_t* c, int64_t) {
  constexpr int64_t kValues = int4 ? 2 : 1;
  __m512i sum[kColumns];
  for (int j = 0; j < kColumns; ++j) {
    __m512i some[4] = {};  // sums that do not wait for one another
    int64_t at = 0;
    for (; at + 256 <= depth; at += 256)
#pragma GCC unroll 4
      for (int64_t i = 0; i < 4; ++i)
        some[i] = AddProducts<int4>(some[i], w[j] + at + 64 * i, x + kValues * (at + 64 * i));
    for (; at < depth; at += 64)
      some[0] = AddProducts<int4>(some[0], w[j] + at, x + kValues * at);
    sum[j] = _mm512_add_epi32(_mm512_add_epi32(some[0], some[1]),
                              _mm512_add_epi32(some[2], some[3]));
  }
  auto* const target = reinterpret_cast<__m128i*>(c);
  __m128i result = SumsAcross(sum[0], sum[1], sum[2], sum[3]);
  if (!first) result = _mm_add_epi32(result, _mm_loadu_si128(target));
  _mm_storeu_si128(target, result);
}

using RowsKernel = void (*)(const int8_t*, int64_t, const uint8_t* const*, int64_t, const PrefetchRows&,
                            int64_t, bool, int32_t*, int64_t);
template <bool int4, bool nz, int... i>
constexpr std::array<RowsKernel, sizeof...(i)> KernelsByRows(std::integer_sequence<int, i...>) {
  return {MultiplyBlock<i + 1, int4, nz>...};
}
// By rows less one.
template <bool int4, bool nz>
constexpr auto kMultiplyBlock = KernelsByRows<int4, nz>(std::make_integer_sequence<int, kRows<int4>>{});

// How 64 bytes of a row of w become values in the order x's are in: 64 of int8, 128 of int4. In memory,
// so that the constants take no register from the accumulators.
struct Unpacking {
  int32_t flip, low;
  bool int4;
};
constexpr Unpacking kUnpacking[] = {{int32_t(0x80808080), 0, false},
                                    {int32_t(0x88888888), 0x0F0F0F0F, true}};

INLINE_VNNI void UnpackWeight(__m512i v, const Unpacking& how, uint8_t* out) {
  v = _mm512_xor_si512(v, _mm512_set1_epi32(how.flip));
  if (how.int4) {
    const __m512i odd = _mm512_srli_epi16(v, 4);
    _mm512_store_si512(out + 64, _mm512_and_si512(odd, _mm512_set1_epi32(how.low)));
    v = _mm512_and_si512(v, _mm512_set1_epi32(how.low));
  }
  _mm512_store_si512(out, v);
}

// Rows of w to be copied while others are multiplied: alone, the copy would wait for memory.
struct PackAhead {
  const uint8_t* from;
  uint8_t* to;
  int64_t rows, row_step;  // how many, and from one to the next
  int64_t blocks;          // of 64 bytes in each
  int64_t w_step;          // from 32 bytes of a row to its next
  // The slices that come after it, to be asked for, are so many bytes further. So each is asked for
  // twice: the processor forgets one line in some hundreds.
  int64_t after, later;
  Unpacking unpacking;
};

// panels * 16 rows by `columns` results over `blocks` of 64 bytes of w, put into or added to c, which
// has the rows of a column together. x has 16 rows times four values a step, the next panel `x_panel`
// bytes on; w has kSliceDepth bytes a column.
template <int panels, int columns>
VNNI void MultiplySlice(const int8_t* x, int64_t x_panel, const uint8_t* w, int64_t blocks,
                        const PackAhead& pack_ahead, bool first, int32_t* c, int64_t c_stride) {
  __m512i sum[columns][panels];
#pragma GCC unroll 16
  for (int j = 0; j < columns; ++j)
#pragma GCC unroll 2
    for (int i = 0; i < panels; ++i) sum[j][i] = _mm512_setzero_si512();
  const int64_t values = pack_ahead.unpacking.int4 ? 128 : 64;
  // as they follow in memory: blocks of a row, or rows of a block where w is FRACTAL_NZ
  const bool nz = pack_ahead.w_step != 32;
  const int64_t run = nz ? pack_ahead.rows : pack_ahead.blocks;
  const int64_t step = nz ? 32 : 64, to_step = nz ? kSliceDepth : values;
  const int64_t next_run = nz ? 2 * pack_ahead.w_step : pack_ahead.row_step;
  const int64_t to_next_run = nz ? values : kSliceDepth;
  const uint8_t* from = pack_ahead.from;
  uint8_t* to = pack_ahead.to;
  int64_t left = run;
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t i = block < pack_ahead.blocks ? pack_ahead.rows : 0; i; --i) {
      const __m512i v = nz ? LoadWeight<true>(from, 0, pack_ahead.w_step)
                           : LoadWeight<false>(from, 0, 32);
      for (const uint8_t* next : {from + pack_ahead.after, from + pack_ahead.later}) {
        _mm_prefetch(next, _MM_HINT_T0);
        if (nz) _mm_prefetch(next + pack_ahead.w_step, _MM_HINT_T0);
      }
      UnpackWeight(v, pack_ahead.unpacking, to);
      from += step;
      to += to_step;
      if (--left == 0) {
        left = run;
        from += next_run - run * step;
        to += to_next_run - run * to_step;
      }
    }
    for (const int8_t* end = x + values * kPanel; x != end; x += 4 * kPanel, w += 4) {
      __m512i rows[panels];
#pragma GCC unroll 2
      for (int i = 0; i < panels; ++i) rows[i] = _mm512_load_si512(x + i * x_panel);
#pragma GCC unroll 16
      for (int j = 0; j < columns; ++j) {
        int32_t four;
        std::memcpy(&four, w + j * kSliceDepth, 4);
        const __m512i word = _mm512_set1_epi32(four);
#pragma GCC unroll 2
        for (int i = 0; i < panels; ++i)
          sum[j][i] = _mm512_dpbusd_epi32(sum[j][i], word, rows[i]);
      }
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < columns; ++j)
#pragma GCC unroll 2
    for (int i = 0; i < panels; ++i) {
      int32_t* target = c + j * c_stride + kPanel * i;
      if (!first) sum[j][i] = _mm512_add_epi32(sum[j][i], _mm512_load_si512(target));
      _mm512_store_si512(target, sum[j][i]);
    }
}

using SliceKernel = void (*)(const int8_t*, int64_t, const uint8_t*, int64_t, const PackAhead&,
                                 bool, int32_t*, int64_t);
template <int panels, int... i>
constexpr std::array<SliceKernel, sizeof...(i)> KernelsByColumns(std::integer_sequence<int, i...>) {
  return {MultiplySlice<panels, i + 1>...};
}
// By columns less one.
template <int panels>
constexpr auto kMultiplySlice =
    KernelsByColumns<panels>(std::make_integer_sequence<int, kAccumulators / panels>{});

// 16 x 16 words transposed: v[i] gets word i of each.
INLINE_VNNI void Transpose16x16(__m512i v[16]) {
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
VNNI int32_t SumOfBytes(const int8_t* x, int64_t count) {
  __m512i sum = _mm512_setzero_si512();
  for (int64_t at = 0; at < count; at += 64)
    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(x + at));
  return _mm512_reduce_add_epi32(sum);
}

// The low four bits of each byte as a number from -8 to 7.
INLINE_VNNI __m512i LowNibbles(__m512i v) {
  const __m512i eight = _mm512_set1_epi8(8);
  v = _mm512_xor_si512(_mm512_and_si512(v, _mm512_set1_epi8(0x0F)), eight);
  return _mm512_sub_epi8(v, eight);
}

// Packed int4 rows as int8: for each 64 bytes the 64 even values, then the 64 odd ones, the end
// filled with zeros.
VNNI void SplitNibbles(const uint8_t* x, int64_t bytes, int8_t* out) {
  for (int64_t at = 0; at < bytes; at += 64) {
    const __m512i v = _mm512_maskz_loadu_epi8(Mask(bytes - at), x + at);
    _mm512_storeu_si512(out + 2 * at, LowNibbles(v));
    _mm512_storeu_si512(out + 2 * at + 64, LowNibbles(_mm512_srli_epi16(v, 4)));
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

bool HasManyRows(const LqMatmul& call) { return call.m >= kManyRows; }

// Some rows and columns of the result.
struct Tile {
  int64_t top, bottom, left, right;
};

// The tiles the result is computed in. Each thread has a share of the columns, the same in each call,
// so that its part of w may be in its cache still; one that is done takes from the others' shares, for
// cores of one machine are not equally fast, and not equally far from the memory w is in.
class TileScheduler {
 public:
  struct alignas(64) Share {
    std::atomic<uint64_t> pieces;  // the first that is left, and where they end: 32 bits each
  };

  // `shares` has room for one a thread.
  TileScheduler(const LqMatmul& call, Share* shares)
      : rows_(call.m), columns_(call.n), threads_(call.threads), shares_(shares) {
    // With few rows a tile has all of them, and as many columns as its thread takes.
    const bool many = HasManyRows(call);
    const int64_t tall = many ? kTileRows : rows_, unit = many ? kPanel : 1;
    const int64_t wide = many ? kLineColumns : kBlockColumns, widest = many ? kTileColumns : columns_;
    // as many tiles a thread as there is work for: one for what takes some 10 us
    const int64_t each =
        std::clamp<int64_t>(call.m * call.n * call.row_bytes / threads_ >> 22, 1, 4);
    const int64_t sixteens = (columns_ + 16 * each * threads_ - 1) / (16 * each * threads_);
    wide_ = std::min(wide, sixteens * 16);
    across_ = (columns_ + wide_ - 1) / wide_;
    most_ = std::min(across_, std::max<int64_t>(1, widest / wide_));
    const int64_t times = std::max((rows_ + tall - 1) / tall, across_ < threads_ ? threads_ : 1);
    tall_ = (rows_ + times * unit - 1) / (times * unit) * unit;
    down_ = (rows_ + tall_ - 1) / tall_;
    for (int64_t i = 0; i < threads_; ++i)
      new (&shares_[i].pieces) std::atomic<uint64_t>(
          Pack(down_ * across_ * i / threads_, down_ * across_ * (i + 1) / threads_));
  }

  // EpilogueColumns of a tile, at most.
  int64_t MaxColumns() const { return most_ * wide_; }

  // The next for a thread; at the end one without columns.
  Tile Next(int64_t thread) {
    for (int64_t i = 0; i < threads_; ++i) {
      std::atomic<uint64_t>& pieces = shares_[(thread + i) % threads_].pieces;
      uint64_t now = pieces.load(std::memory_order_relaxed);
      while (now >> 32 < (now & kLow)) {
        // half of what is left, from the front of one's own share and from the end of another's
        const int64_t begin = now >> 32, end = now & kLow;
        const int64_t take = threads_ == 1 ? most_ : std::min(most_, (end - begin + 1) / 2);
        const Piece piece = PieceAt(i == 0 ? begin : end - 1);
        const int64_t from = i == 0 ? begin : std::max(end - take, piece.first);
        const int64_t to = i == 0 ? std::min(begin + take, piece.last) : end;
        if (!pieces.compare_exchange_weak(now, i == 0 ? Pack(to, end) : Pack(begin, from),
                                          std::memory_order_relaxed))
          continue;
        const int64_t left = (piece.across + from - piece.first) * wide_;
        return {piece.down * tall_, std::min(rows_, (piece.down + 1) * tall_), left,
                std::min(columns_, left + (to - from) * wide_)};
      }
    }
    return {};
  }

 private:
  static constexpr uint64_t kLow = 0xFFFFFFFF;
  static uint64_t Pack(int64_t begin, int64_t end) { return uint64_t(begin) << 32 | uint64_t(end); }

  // Pieces, of tall_ rows and wide_ columns, are numbered so that as many as a tile has are next to
  // one another, below them those of the same columns, and then those to their right.
  struct Piece {
    int64_t first, last;   // the numbers of those beside it that one tile may have
    int64_t across, down;  // where the first of them is
  };
  Piece PieceAt(int64_t number) const {
    const int64_t across = number / (most_ * down_) * most_, above = across * down_;
    const int64_t beside = std::min(most_, across_ - across), down = (number - above) / beside;
    return {above + down * beside, above + (down + 1) * beside, across, down};
  }

  int64_t rows_, columns_, threads_, tall_, wide_, most_, across_, down_;
  Share* shares_;
};

// What sixteen columns of the result are multiplied by, and what is added to them.
struct EpilogueColumns {
  __mmask16 mask;
  __m512i int_bias, offset;
  __m512 scale, float_bias;
};

// From `column` on; only `count` of them if that is less than sixteen.
INLINE_VNNI EpilogueColumns LoadColumns(const LqMatmul& call, int64_t column, int64_t count) {
  EpilogueColumns c;
  c.mask = count >= 16 ? 0xFFFF : (1u << std::max<int64_t>(count, 0)) - 1;
  c.int_bias = c.offset = _mm512_setzero_si512();
  c.scale = c.float_bias = _mm512_setzero_ps();
  if (call.int_bias) c.int_bias = _mm512_maskz_loadu_epi32(c.mask, call.int_bias + column);
  if (call.float_bias) c.float_bias = _mm512_maskz_loadu_ps(c.mask, call.float_bias + column);
  if (call.output == 0) {
    // no scale
  } else if (call.packed) {
    __m512i words[2];
    for (int half = 0; half < 2; ++half) {
      const auto* word = static_cast<const int64_t*>(call.scale);
      words[half] = call.scale_stride
                        ? _mm512_maskz_loadu_epi64(c.mask >> (8 * half), word + column + 8 * half)
                        : _mm512_set1_epi64(*word);
    }
    const __m512i low = Low32(words[0], words[1]);
    c.scale = _mm512_castsi512_ps(_mm512_and_si512(low, _mm512_set1_epi32(~0x1FFF)));
    // bits 37 to 45, two's complement
    const __m512i high = Low32(_mm512_srli_epi64(words[0], 37), _mm512_srli_epi64(words[1], 37));
    c.offset = _mm512_srai_epi32(_mm512_slli_epi32(high, 23), 23);
  } else {
    const auto* factor = static_cast<const float*>(call.scale);
    c.scale = call.scale_stride ? _mm512_maskz_loadu_ps(c.mask, factor + column)
                                : _mm512_set1_ps(*factor);
  }
  return c;
}

// Sixteen results of a row, from their sums to `out`, whose element `at` is the first.
INLINE_VNNI void StoreColumns(const LqMatmul& call, const EpilogueColumns& c, __m512i sum, int64_t row,
                       int64_t at) {
  sum = _mm512_add_epi32(sum, c.int_bias);
  if (call.output == 0) {
    _mm512_mask_storeu_epi32(static_cast<int32_t*>(call.out) + at, c.mask, sum);
    return;
  }
  __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), c.scale);
  if (call.output == 1) {
    // the 9-bit clip comes before the offset, rounding before both
    value = _mm512_roundscale_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    value = _mm512_min_ps(_mm512_set1_ps(255), _mm512_max_ps(_mm512_set1_ps(-256), value));
    const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(value), c.offset);
    _mm_mask_storeu_epi8(static_cast<int8_t*>(call.out) + at, c.mask, _mm512_cvtsepi32_epi8(whole));
    return;
  }
  if (call.packed && call.output == 2)
    value = _mm512_min_ps(_mm512_set1_ps(65504), _mm512_max_ps(_mm512_set1_ps(-65504), value));
  if (call.pertoken) value = _mm512_mul_ps(value, _mm512_set1_ps(call.pertoken[row]));
  if (call.float_bias) value = _mm512_add_ps(value, c.float_bias);
  const __m256i narrow = call.output == 2
                             ? _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
                             : ToBfloat16(value);
  _mm256_mask_storeu_epi16(static_cast<int16_t*>(call.out) + at, c.mask, narrow);
}

// Results of a tile, from accumulators to `out`. What flipping w added to each row's is `compensation`. By
// lines of 16-bit results: rows of `out` may be such a distance apart that the first cache loses a
// line before it is come back to.
VNNI void Epilogue(const LqMatmul& call, const int32_t* sums, int64_t stride, const int32_t* compensation,
                 const Tile& tile) {
  for (int64_t column = tile.left; column < tile.right; column += kLineColumns, sums += kLineColumns) {
    const int64_t count = tile.right - column;
    const EpilogueColumns first = LoadColumns(call, column, count);
    const EpilogueColumns second = LoadColumns(call, column + 16, count - 16);
    for (int64_t row = tile.top; row < tile.bottom; ++row) {
      const int64_t i = row - tile.top, at = row * call.n + column;
      const __m512i more = _mm512_set1_epi32(compensation[i]);
      const int32_t* const sum = sums + i * stride;
      StoreColumns(call, first, _mm512_sub_epi32(_mm512_loadu_si512(sum), more), row, at);
      if (count > 16)
        StoreColumns(call, second, _mm512_sub_epi32(_mm512_loadu_si512(sum + 16), more), row, at + 16);
    }
  }
}

// Brings what will be written of `out` to the caches.
VNNI void PrefetchOutput(const LqMatmul& call, const Tile& tile) {
  const int64_t width = call.output == 0 ? 4 : call.output == 1 ? 1 : 2;
  for (int64_t row = tile.top; row < tile.bottom; ++row) {
    char* const out = static_cast<char*>(call.out) + row * call.n * width;
    for (int64_t at = tile.left * width; at < tile.right * width; at += 64)
      __builtin_prefetch(out + at, 1);
  }
}

// x as it is read. With few rows they end in zeros up to a multiple of 64 bytes of w, and begin 64
// bytes further from one another than that: rows a multiple of 4096 bytes apart would all want the
// same lines of the L1 cache. With many, as MultiplySlice reads them: for each slice of k, its panels.
struct PackedX {
  int8_t* x;
  int64_t stride;    // few rows: bytes a row; many: bytes a value of k
  int32_t* compensation;  // what flipping w adds to each row's results
};

// Where byte `from`, a multiple of 64, of row `row` of w is.
inline const uint8_t* WeightAt(const LqMatmul& call, int64_t row, int64_t from) {
  return call.w + row * call.w_stride + from / 32 * call.w_step;
}

bool IsNz(const LqMatmul& call) { return call.w_step != 32; }

// Bytes of w's rows in each slice but the last, which has hardly less: what comes from memory while a
// short slice is multiplied is short.
int64_t SliceBytes(const LqMatmul& call) {
  const bool once = call.m <= (call.int4 ? kRows<true> : kRows<false>);
  int64_t most = call.m == 1 ? kDepthOneRow : once ? kDepthOneBlock : kDepthManyBlocks;
  if (HasManyRows(call)) most = call.int4 ? kSliceDepth / 2 : kSliceDepth;
  const int64_t blocks = (call.row_bytes + 63) / 64, slices = (blocks * 64 + most - 1) / most;
  return (blocks + slices - 1) / slices * 64;
}

// The bytes [from, from + depth) of the rows of w that some columns of a tile are: `tile` is these, and
// there are `before` columns left of them. With it the results of `complete` are, if that has columns.
struct Slice {
  Tile tile;
  int64_t before, from, depth;
  Tile complete;
};

// The slices of one thread, in their order; at the end one without columns.
class Slices {
 public:
  Slices(const LqMatmul& call, TileScheduler* tiles, int64_t thread)
      : many_(HasManyRows(call)),
        columns_(call.n),
        wide_(many_ ? kSliceColumns : kBlockColumns),
        bytes_(call.row_bytes),
        most_(SliceBytes(call)),
        deep_((bytes_ + most_ - 1) / most_),
        tiles_(tiles),
        thread_(thread) {}

  Slice Next() {
    if (number_ == across_ * deep_) {
      tile_ = tiles_->Next(thread_);
      across_ = (tile_.right - tile_.left + wide_ - 1) / wide_;
      number_ = 0;
    }
    return across_ ? At(number_++) : Slice{};
  }

  // What is likely to come `i` slices after the next, if anything: enough to ask memory for it.
  Slice Lookahead(int64_t i) const { return across_ ? At(number_ + i) : Slice{}; }

 private:
  // Of the tile, or beyond it of the columns to its right.
  Slice At(int64_t number) const {
    // With many rows all of x's values that a slice needs stay in L2 while columns pass by; with few,
    // a row of w is read to its end.
    const int64_t beyond = number - across_ * deep_;
    int64_t column = number / deep_, from = number % deep_;
    if (many_) {
      column = beyond < 0 ? number % across_ : across_ + beyond;
      from = beyond < 0 ? number / across_ : 0;
    }
    from *= most_;
    const int64_t before = column * wide_, left = tile_.left + before;
    const int64_t end = beyond < 0 ? tile_.right : columns_;
    if (left >= end) return {};
    Slice slice{tile_, before, from, std::min(most_, bytes_ - from), {}};
    slice.tile.left = left;
    slice.tile.right = std::min(end, left + wide_);
    const int64_t written = std::max(wide_, kLineColumns);
    const bool fills = (before + wide_) % written == 0 || slice.tile.right == tile_.right;
    if (from + most_ >= bytes_ && fills) {
      slice.complete = slice.tile;
      slice.complete.left -= before % written;
    }
    return slice;
  }

  bool many_;
  int64_t columns_, wide_, bytes_, most_, deep_;
  TileScheduler* tiles_;
  int64_t thread_;
  Tile tile_{};
  int64_t across_ = 0, number_ = 0;
};

// Few rows of x by a slice, into `sums`, while the next comes from memory.
template <bool int4>
VNNI void MultiplyRows(const LqMatmul& call, const PackedX& left, const Slice& slice,
                       const Slice& next, int32_t* sums) {
  const Tile& tile = slice.tile;
  const int64_t whole = slice.depth / 64 * 64, tail = slice.depth - whole;
  const int8_t* const x = left.x + slice.from * (int4 ? 2 : 1);
  // x's rows stay in L1 while w's pass by; blocks of them are as high as one another
  const int64_t height = tile.bottom - tile.top, count = (height + kRows<int4> - 1) / kRows<int4>;
  const int64_t width = tile.right - tile.left;
  // asked for the sooner the more there is to do with what is here
  const int64_t ahead = int4 || count > 1 ? width : kBlockColumns / 4;
  const bool far = call.n * call.row_bytes > kCacheBytes, alone = far && call.m == 1 && !IsNz(call);
  const RowsKernel in_order = MultiplyRow<int4>;
  const RowsKernel* const multiply = alone        ? &in_order
                                     : IsNz(call) ? kMultiplyBlock<int4, true>.data()
                                                  : kMultiplyBlock<int4, false>.data();
  for (int64_t number = 0; number < count; ++number) {
    const int64_t row = tile.top + height * number / count;
    const int64_t rows = tile.top + height * (number + 1) / count - row;
    // Of each four rows of w to come, those that are asked for while this block is multiplied.
    const int64_t asked = kColumns * number / count;
    const int64_t asking = kColumns * (number + 1) / count - asked;
    for (int64_t column = 0; column < width; column += kColumns) {
      const uint8_t* w[kColumns];
      for (int64_t i = 0; i < kColumns; ++i)
        w[i] = WeightAt(call, std::min(tile.left + column + i, call.n - 1), slice.from);
      const int8_t* const some = x + row * left.stride;
      int32_t* const c = sums + (row - tile.top) * kBlockColumns + column;
      if (whole) {
        const int64_t row_ahead =
            ahead + asked * ((width + kColumns - 1) / kColumns) + column / kColumns * asking;
        const bool here = row_ahead < width;
        const PrefetchRows prefetch{here ? WeightAt(call, tile.left + row_ahead, slice.from)
                                 : WeightAt(call, next.tile.left + row_ahead - width, next.from),
                            call.w_stride, far && (here || next.tile.right) ? asking : 0};
        multiply[rows - 1](some, left.stride, w, call.w_step, prefetch, whole, slice.from == 0, c,
                           kBlockColumns);
      }
      if (tail) {  // as copies, plain ones, that end in zeros
        uint8_t copies[kColumns][64] = {};
        for (int64_t i = 0; i < kColumns; ++i) {
          const uint8_t* const end = w[i] + whole / 32 * call.w_step;
          std::memcpy(copies[i], end, std::min<int64_t>(tail, 32));
          if (tail > 32) std::memcpy(copies[i] + 32, end + call.w_step, tail - 32);
          w[i] = copies[i];
        }
        kMultiplyBlock<int4, false>[rows - 1](some + whole * (int4 ? 2 : 1), left.stride, w, 32, {}, 64,
                                         slice.depth == tail && slice.from == 0, c, kBlockColumns);
      }
    }
  }
}

template <bool int4>
VNNI void FewRows(const LqMatmul& call, const PackedX& x, TileScheduler* tiles, int64_t thread,
                  int32_t* sums) {
  Slices slices(call, tiles, thread);
  for (Slice slice = slices.Next(); slice.tile.right; slice = slices.Next()) {
    MultiplyRows<int4>(call, x, slice, slices.Lookahead(0), sums);
    if (slice.complete.right)
      Epilogue(call, sums, kBlockColumns, x.compensation + slice.tile.top, slice.complete);
  }
}

// Sums of a panel of x and the columns of `tile`, transposed so that those of a row are together.
VNNI void PanelEpilogue(const LqMatmul& call, const int32_t* sums, int64_t stride,
                      const int32_t* compensation, const Tile& tile) {
  alignas(64) int32_t rows[kPanel * kLineColumns];
  for (int64_t column = 0; column < tile.right - tile.left; column += 16, sums += 16 * stride) {
    __m512i v[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) v[i] = _mm512_load_si512(sums + i * stride);
    Transpose16x16(v);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_store_si512(rows + i * kLineColumns + column, v[i]);
  }
  Epilogue(call, rows, kLineColumns, compensation, tile);
}

// A slice, from byte `done` of each row on, for MultiplySlice.
VNNI void PackSlice(const LqMatmul& call, const Slice& slice, int64_t done, uint8_t* out) {
  const int64_t values = call.int4 ? 2 : 1;
  for (int64_t row = slice.tile.left; row < slice.tile.right; ++row, out += kSliceDepth) {
    const uint8_t* const w = WeightAt(call, row, slice.from);
    for (int64_t at = done; at < slice.depth; at += 64) {
      const int64_t left = slice.depth - at;
      __m512i v;
      if (IsNz(call))  // its rows end in zeros up to a multiple of 32 bytes
        v = LoadWeight<true>(w + at / 32 * call.w_step, 0, left > 32 ? call.w_step : 0);
      else
        v = _mm512_maskz_loadu_epi8(Mask(left), w + at);
      UnpackWeight(v, kUnpacking[call.int4], out + at * values);
    }
  }
}

// The rows of x of a slice's tile by the slice, which is copied to `w`, into `sums`; what is `pack_ahead`
// is shared out over the calls, and so is what of the result will be written after them.
VNNI void MultiplyPanels(const LqMatmul& call, const PackedX& x, const Slice& slice, const uint8_t* w,
                         PackAhead pack_ahead, int32_t* sums) {
  constexpr int64_t kNarrow = kAccumulators / 2;
  const Tile& tile = slice.tile;
  const int64_t values = call.int4 ? 2 : 1;
  const int64_t height = tile.bottom - tile.top, columns = tile.right - tile.left;
  const int64_t panels = (height + kPanel - 1) / kPanel, pairs = panels / 2;
  const int64_t blocks = (slice.depth + 63) / 64, x_panel = blocks * 64 * values * kPanel;
  const int8_t* const rows =
      x.x + slice.from * values * x.stride + tile.top * blocks * 64 * values;
  const int64_t calls = pairs * ((columns + kNarrow - 1) / kNarrow) +
                        panels % 2 * ((columns + kAccumulators - 1) / kAccumulators);
  int64_t left = pack_ahead.rows, number = 0;
  const int64_t each = (left + calls - 1) / calls;
  const auto multiply = [&](int64_t panel, int64_t column, const auto& kernels) {
    if (slice.complete.right)
      PrefetchOutput(call, {tile.top + height * number / calls, tile.top + height * (number + 1) / calls,
                    slice.complete.left, slice.complete.right});
    ++number;
    pack_ahead.rows = std::min(each, left);
    kernels[std::min<int64_t>(kernels.size(), columns - column) - 1](
        rows + panel * x_panel, x_panel, w + column * kSliceDepth, blocks, pack_ahead, slice.from == 0,
        sums + (column * panels + panel) * kPanel, panels * kPanel);
    left -= pack_ahead.rows;
    pack_ahead.from += pack_ahead.rows * pack_ahead.row_step;
    pack_ahead.to += pack_ahead.rows * kSliceDepth;
  };
  // the columns' tile of w stays in L1 while x's pairs of panels pass by
  for (int64_t column = 0; column < columns; column += kNarrow)
    for (int64_t pair = 0; pair < pairs; ++pair) multiply(2 * pair, column, kMultiplySlice<2>);
  if (panels % 2)
    for (int64_t column = 0; column < columns; column += kAccumulators)
      multiply(panels - 1, column, kMultiplySlice<1>);
}

// Bytes of two slices of w, as MultiplySlice reads them. Not on a thread's stack: OMP_STACKSIZE may
// have left it little.
constexpr int64_t kCopies = 2 * kSliceDepth * kSliceColumns;

VNNI void ManyRows(const LqMatmul& call, const PackedX& x, TileScheduler* tiles, int64_t thread,
                   uint8_t* copies, int32_t* sums) {
  uint8_t *w = copies, *other = copies + kSliceDepth * kSliceColumns;
  int64_t copied = 0;  // bytes of each row of the slice that are there already
  Slices slices(call, tiles, thread);
  Slice slice = slices.Next(), next = slices.Next();
  while (slice.tile.right) {
    const Slice after = slices.Lookahead(0), later = slices.Lookahead(1);
    const Tile& tile = slice.tile;
    if (copied < slice.depth) PackSlice(call, slice, copied, w);
    const uint8_t* const from = WeightAt(call, next.tile.left, next.from);
    copied = std::min((slice.depth + 63) / 64, next.depth / 64) * 64;
    const PackAhead pack_ahead{from,
                            other,
                            next.tile.right - next.tile.left,
                            call.w_stride,
                            copied / 64,
                            call.w_step,
                            WeightAt(call, after.tile.left, after.from) - from,
                            WeightAt(call, later.tile.left, later.from) - from,
                            kUnpacking[call.int4]};
    const int64_t panels = (tile.bottom - tile.top + kPanel - 1) / kPanel;
    int32_t* const own = sums + slice.before * panels * kPanel;
    MultiplyPanels(call, x, slice, w, pack_ahead, own);
    if (slice.complete.right) {
      const int32_t* const first = own - (tile.left - slice.complete.left) * panels * kPanel;
      for (int64_t panel = 0; panel < panels; ++panel) {
        Tile written = slice.complete;
        written.top += panel * kPanel;
        written.bottom = std::min(tile.bottom, written.top + kPanel);
        PanelEpilogue(call, first + panel * kPanel, panels * kPanel, x.compensation + written.top, written);
      }
    }
    slice = next;
    next = slices.Next();
    std::swap(w, other);
  }
}

// A panel of kPanel rows of x from `top`, transposed: for each slice of k, and for each four values of
// k, those of each row.
template <bool int4>
VNNI void PackPanel(const LqMatmul& call, int64_t top, const PackedX& x) {
  constexpr int64_t kValues = int4 ? 2 : 1;
  const int64_t most = SliceBytes(call);
  const __m512i one = _mm512_set1_epi8(1);
  __m512i total = _mm512_setzero_si512();
  for (int64_t from = 0; from < call.row_bytes; from += most) {
    const int64_t depth = std::min(most, call.row_bytes - from);
    int8_t* out = x.x + from * kValues * x.stride + top * ((depth + 63) / 64 * 64 * kValues);
    for (int64_t at = 0; at < depth; at += 64) {
      const __mmask64 mask = Mask(depth - at);
      __m512i halves[kValues][16] = {};
      for (int64_t i = 0; i < std::min(kPanel, call.m - top); ++i) {
        const __m512i v =
            _mm512_maskz_loadu_epi8(mask, call.x + (top + i) * call.x_stride + from + at);
        halves[0][i] = v;
        if constexpr (int4) {
          halves[0][i] = LowNibbles(v);
          halves[1][i] = LowNibbles(_mm512_srli_epi16(v, 4));
        }
      }
      for (auto& half : halves) {
        Transpose16x16(half);
        for (int i = 0; i < 16; ++i, out += 64) {
          _mm512_store_si512(out, half[i]);
          total = _mm512_dpbusd_epi32(total, one, half[i]);
        }
      }
    }
  }
  _mm512_store_si512(x.compensation + top, _mm512_slli_epi32(total, int4 ? 3 : 7));
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
VNNI int32_t PackRow(const uint8_t* source, int64_t bytes, int8_t* row, int64_t padded) {
  if constexpr (int4) {
    SplitNibbles(source, bytes, row);
  } else {
    std::memcpy(row, source, bytes);
    std::memset(row + bytes, 0, padded - bytes);
  }
  return (int4 ? 8 : 128) * SumOfBytes(row, padded);
}

template <bool int4>
VNNI int Run(const LqMatmul& call) {
  const int64_t m = call.m, threads = call.threads;
  const bool many = HasManyRows(call);
  const int64_t padded = (call.row_bytes + 63) / 64 * 64 * (int4 ? 2 : 1);
  const int64_t panels = (m + kPanel - 1) / kPanel;
  const int64_t stride = many ? panels * kPanel : padded + 64;
  const auto shares = Allocate<TileScheduler::Share>(threads);
  if (!shares) return kNoMemory;
  TileScheduler tiles(call, shares.get());
  const int64_t own_sums =
      many ? std::min(kTileRows, panels * kPanel) * tiles.MaxColumns() : m * kBlockColumns;
  const auto copy = Allocate<int8_t>(many ? stride * padded : m * stride);
  const auto compensation = Allocate<int32_t>(panels * kPanel);
  const auto sums = Allocate<int32_t>(threads * own_sums);
  const auto copies = Allocate<uint8_t>(many ? threads * kCopies : 0);
  if (!copy || !compensation || !sums || !copies) return kNoMemory;
  const PackedX x{copy.get(), stride, compensation.get()};

  const auto copy_few = [&](int64_t number, int64_t count) {
    for (int64_t i = m * number / count; i < m * (number + 1) / count; ++i)
      x.compensation[i] = PackRow<int4>(call.x + i * call.x_stride, call.row_bytes,
                                x.x + i * stride, padded);
  };
  const auto copy_many = [&](int64_t number, int64_t count) {
    for (int64_t panel = panels * number / count; panel < panels * (number + 1) / count; ++panel)
      PackPanel<int4>(call, panel * kPanel, x);
  };
  const auto compute_part = [&](int64_t number) {
    int32_t* const own = sums.get() + number * own_sums;
    if (many)
      ManyRows(call, x, &tiles, number, copies.get() + number * kCopies, own);
    else
      FewRows<int4>(call, x, &tiles, number, own);
  };
  const auto copy_part = [&](int64_t number, int64_t count) {
    many ? copy_many(number, count) : copy_few(number, count);
  };
  if (threads == 1) {
    copy_part(0, 1);
    compute_part(0);
  } else {
#pragma omp parallel num_threads(threads)
    {
      copy_part(omp_get_thread_num(), omp_get_num_threads());
#pragma omp barrier
      compute_part(omp_get_thread_num());
    }
  }
  return kDone;
}

// Whether no packed scale holds infinity or NaN: what the chips make of them is not published.
bool IsFinite(const LqMatmul& call) {
  if (!call.packed || call.output == 0) return true;
  constexpr int64_t kExponent = 0x7F800000;
  const auto* word = static_cast<const int64_t*>(call.scale);
  const int64_t count = call.scale_stride ? call.n : 1;
  bool finite = true;  // no early end, so that the compiler makes vectors of it
  for (int64_t i = 0; i < count; ++i) finite &= (word[i] & kExponent) != kExponent;
  return finite;
}

}  // namespace

extern "C" {

// Whether this processor has what the kernel needs.
int lq_matmul_supported() {
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

#ifndef LQ_SOURCES
#define LQ_SOURCES ""
#endif

// The sources this was built from, as CMakeLists.txt puts them into one word.
const char* lq_matmul_sources() { return LQ_SOURCES; }

// One of Answer. `bytes` is what the caller takes LqMatmul to have.
int lq_matmul(const LqMatmul* call, size_t bytes = sizeof(LqMatmul)) {
  if (bytes != sizeof(LqMatmul)) return kOtherStruct;
  if (!IsFinite(*call)) return kNotFinite;
  return call->int4 ? Run<true>(*call) : Run<false>(*call);
}
}
