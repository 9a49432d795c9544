// What this machine can do at most: int8 products from registers, and bytes read from memory.
// cpu_kernel.py compiles and calls this. The threads are torch's own, through the OpenMP runtime it
// has loaded: others would compete with them, for they spin a while after each piece of work.
#include <immintrin.h>

#include <cstdint>

extern "C" int omp_get_thread_num();

#define VNNI __attribute__((target("avx512f,avx512bw,avx512vnni")))

namespace {

VNNI int Products(int64_t steps) {
  const __m512i a = _mm512_set1_epi32(0x01020304), b = _mm512_set1_epi32(0x01010101);
  __m512i sum[16];
  for (auto& s : sum) s = _mm512_setzero_si512();
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) sum[j] = _mm512_dpbusd_epi32(sum[j], a, b);
    asm volatile("" ::"x"(sum[0]));
  }
  int result = 0;
  for (auto& s : sum) result += _mm512_reduce_add_epi32(s);
  return result;
}

VNNI int64_t Read(const uint8_t* from, int64_t bytes) {
  __m512i bits[4] = {};
  for (int64_t at = 0; at + 256 <= bytes; at += 256)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      bits[i] = _mm512_xor_si512(bits[i], _mm512_loadu_si512(from + at + 64 * i));
  return _mm512_reduce_or_epi64(
      _mm512_or_si512(_mm512_or_si512(bits[0], bits[1]), _mm512_or_si512(bits[2], bits[3])));
}

volatile int64_t sink;

}  // namespace

extern "C" {

// At least `count` multiply-accumulates of int8, shared out over the threads.
void int8_products(int64_t count, int threads) {
  const int64_t steps = count / (16 * 64) / threads + 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
  sink = sink + Products(steps);
}

// Every byte of a buffer, read once.
void read_bytes(const uint8_t* buffer, int64_t bytes, int threads) {
  const int64_t part = bytes / threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
  sink = sink + Read(buffer + omp_get_thread_num() * part, part);
}
}
