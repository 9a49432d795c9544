// The CPU kernel of quantized matmul: x, int8 or packed int4, times the weight as it is stored, ND (n, k)
// or FRACTAL_NZ, exact in int32, and LinearQuant's epilogue. It needs x86-64 with AVX-512 VNNI; elsewhere
// numerics.py computes the same with torch. Python loads it with ctypes; it does not use torch.
//
// VPDPBUSD multiplies unsigned by signed bytes. Flipping the top bit makes the weight unsigned and adds
// 128 to each value (8 to an int4). The epilogue subtracts what that adds, the compensation:
//   sum x*(w + 128) - 128 * sum x = sum x*w, in arithmetic modulo 2^32, and so exact.
//
// The threads are those of torch's OpenMP runtime: this library is not linked to a runtime, and finds
// GOMP_parallel among the symbols of the process. So torch.set_num_threads applies here too.
//
// Read in this order: call.h (the call), sizes.h, tile.h (the order of the work), then few_rows.h and
// many_rows.h, the two kernels, with pack.h, prefetch.h and epilogue.h. The headers are parts of this
// one translation unit, because the compiler must inline across them.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "call.h"
#include "few_rows.h"
#include "many_rows.h"
#include "pack.h"
#include "sizes.h"
#include "tile.h"

extern "C" {
int omp_get_thread_num();
int omp_get_num_threads();
}

namespace {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <typename T>
using Buffer = std::unique_ptr<T, Free>;
template <typename T>
Buffer<T> Allocate(int64_t count) {
  return Buffer<T>(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 64) / 64 * 64)));
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
  const auto copies = Allocate<uint8_t>(many ? threads * kPackedBytes : 0);
  if (!copy || !compensation || !sums || !copies) return kNoMemory;
  const PackedX x{copy.get(), stride, compensation.get()};

  const auto copy_few = [&](int64_t number, int64_t count) {
    for (int64_t i = m * number / count; i < m * (number + 1) / count; ++i)
      x.compensation[i] =
          PackRow<int4>(call.x + i * call.x_stride, call.row_bytes, x.x + i * stride, padded);
  };
  const auto copy_many = [&](int64_t number, int64_t count) {
    for (int64_t panel = panels * number / count; panel < panels * (number + 1) / count; ++panel)
      PackPanel<int4>(call, panel * kPanel, x);
  };
  const auto compute_part = [&](int64_t number) {
    int32_t* const own = sums.get() + number * own_sums;
    if (many)
      ManyRows(call, x, &tiles, number, copies.get() + number * kPackedBytes, own);
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

// Whether no packed scale holds infinity or NaN: how the chips compute with them is not published.
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

// Whether this processor has the instructions that the kernel needs.
int lq_matmul_supported() {
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

#ifndef LQ_SOURCES
#define LQ_SOURCES ""
#endif

// The digest of the sources that this was built from, as CMakeLists.txt computes it.
const char* lq_matmul_sources() { return LQ_SOURCES; }

// Returns one of Answer. `bytes` is the size of LqMatmul in the caller.
int lq_matmul(const LqMatmul* call, size_t bytes = sizeof(LqMatmul)) {
  if (bytes != sizeof(LqMatmul)) return kOtherStruct;
  if (!IsFinite(*call)) return kNotFinite;
  return call->int4 ? Run<true>(*call) : Run<false>(*call);
}
}
