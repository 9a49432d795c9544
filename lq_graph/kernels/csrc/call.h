// One call of the kernel, as native.py packs it, and its return codes.
#ifndef LQ_GRAPH_CALL_H_
#define LQ_GRAPH_CALL_H_
#include <immintrin.h>

#include <cstdint>

#include "sizes.h"

#define VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,prfchw")))
#define INLINE_VNNI __attribute__((always_inline)) inline VNNI

extern "C" {

// Strides count bytes for x and w, elements elsewhere. A scale_stride of 0: one scale for all columns.
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
  // Bytes from 32 bytes of a row of w to the next 32 of that row: 32 in ND, more in FRACTAL_NZ, where
  // w_stride is 32.
  int64_t w_step;
  int32_t int4;
  int32_t packed;  // scale is int64, the offset in it
  int32_t output;  // 0 int32, 1 int8, 2 float16, 3 bfloat16
  int32_t threads;
};
}

namespace {

// The return codes of lq_matmul.
enum Answer : int { kDone = 0, kNoMemory = 1, kNotFinite = 2, kOtherStruct = 3 };

bool HasManyRows(const LqMatmul& call) { return call.m >= kManyRows; }

// Address of byte `from`, a multiple of 64, of row `row` of w.
inline const uint8_t* WeightAt(const LqMatmul& call, int64_t row, int64_t from) {
  return call.w + row * call.w_stride + from / 32 * call.w_step;
}

bool IsNz(const LqMatmul& call) { return call.w_step != 32; }

}  // namespace

#endif  // LQ_GRAPH_CALL_H_
