// The calls of the kernels, as native.py packs them, and their return codes.
#ifndef LQ_GRAPH_CALL_H_
#define LQ_GRAPH_CALL_H_
#include <cstddef>
#include <cstdint>

// Of struct LqQuantize. Scoped, because the kernels have constants of such names.
enum class LqFloat : int32_t { kFloat16 = 0, kBfloat16 = 1, kFloat32 = 2 };
enum class LqValues : int32_t { kInt8 = 0, kPackedInt4 = 1, kInt4 = 2 };  // int4, one to a byte
// The first five are Arithmetic's of kernels/activations.py, in its order.
enum class LqArithmetic : int32_t { kMultiply, kReciprocal, kDivide, kHalf, kStep, kStatic };

extern "C" {

// Strides count bytes for x and w, elements elsewhere. A scale_stride of 0: one scale for all columns.
struct LqMatmul {
  const uint8_t* x;         // (m, row_bytes)
  const uint8_t* w;         // (n, row_bytes)
  const uint8_t* prepared;  // w as `prepare` packed it, or null
  const void* scale;        // float32 or packed int64; unused for int32 output
  const float* offset;      // (n) or (1), to be folded with a float32 scale, or null
  const float* pertoken;    // (m) or null
  const int32_t* int_bias;  // (n) or null
  const float* float_bias;  // (n) or null
  void* out;                // (m, n)
  int64_t m, n, row_bytes;  // k bytes for int8, k / 2 for int4
  int64_t x_stride, w_stride, scale_stride, offset_stride;
  // Bytes from 32 bytes of a row of w to the next 32 of that row: 32 in ND, more in FRACTAL_NZ, where
  // w_stride is 32.
  int64_t w_step;
  int32_t int4;
  int32_t scale_kind;  // 0 float32, 1 float32 to be folded, 2 packed: int64 with the offset in it
  int32_t output;      // 0 int32, 1 int8, 2 float16, 3 bfloat16
  int32_t threads;
};

// Rows of activations to be quantized: see activations.h.
struct LqQuantize {
  const void* x;       // (m, k), of dtype
  const void* factor;  // (k) or (1), of dtype, if static
  const void* offset;  // as factor, or null
  void* out;           // (m, k) int8, or (m, k / 2) bytes of two int4, the first one low
  float* scale;        // (m), if dynamic
  int64_t m, k;
  int64_t x_stride;       // bytes
  int64_t factor_stride;  // 0: one factor, and one offset, for all columns
  LqFloat dtype;
  LqArithmetic arithmetic;
  LqValues values;
  int32_t threads;
};

// A layer: rows are quantized, dynamically or statically, and multiplied. Of `quantize`, out and scale are
// not read, nor threads; of `matmul`, x, x_stride and, for dynamic rows, pertoken.
struct LqLayer {
  LqQuantize quantize;
  LqMatmul matmul;
};

// What one instruction set computes. Each of targets/ defines one.
struct LqTarget {
  const char* name;
  bool (*is_supported)();  // by this processor
  int (*matmul)(const LqMatmul& call);
  int (*quantize)(const LqQuantize& call);
  int (*layer)(const LqLayer& call);
  // A weight, packed in the order in which this instruction set reads it fastest; 0 bytes if that would
  // not be faster. Of a call they read what is about w.
  int64_t (*prepared_bytes)(const LqMatmul& call);
  void (*prepare)(const LqMatmul& call, uint8_t* out);
  // One that was never run on hardware is taken only if it is named.
  bool untested = false;
  // Asks the system for the instructions, if that is necessary; returns whether it lets us use them.
  bool (*permit)() = nullptr;
};
}

// Return codes.
enum LqAnswer : int { kDone = 0, kNoMemory = 1, kNotFinite = 2, kOtherStruct = 3 };
enum LqScale : int32_t { kFloat = 0, kFolded = 1, kPacked = 2 };

#endif  // LQ_GRAPH_CALL_H_
