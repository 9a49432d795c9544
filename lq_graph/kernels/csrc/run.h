// A call, computed with the instruction set of the file that includes this one. targets/ has one such
// file for each.
//
// Read in this order: call.h (the calls), isa/avx512.h and by_words.h (the vector layer), sizes.h, tile.h
// (the order of the work), then few_rows.h, many_rows.h and prepared.h, the three kernels, with pack.h,
// multiply.h, prefetch.h and epilogue.h; and activations.h, which stands alone.
// The headers are parts of one translation unit, because the compiler must inline across them.
#ifndef LQ_GRAPH_RUN_H_
#define LQ_GRAPH_RUN_H_
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "activations.h"
#include "call.h"
#include "few_rows.h"
#include "geometry.h"
#include "many_rows.h"
#include "pack.h"
#include "prepared.h"
#include "simd.h"
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

// The kernels of a product.
enum class Way { kFewRows, kManyRows, kPrepared };

Way WayOf(const LqMatmul& call) {
  if (call.prepared && call.m >= kPreparedRows && IsPrepared(call)) return Way::kPrepared;
  return HasManyRows(call) ? Way::kManyRows : Way::kFewRows;
}

TileScheduler::Shape TilesOf(const LqMatmul& call, Way way) {
  // With few rows a tile has all rows, and as many columns as a thread takes at once.
  if (way == Way::kFewRows) return {call.m, 1, 16, kBlockColumns, call.n};
  if (way == Way::kManyRows) return {kTileRows, kPanel, 16, kLineColumns, kTileColumns};
  return {kTileRows, 1, kGroupColumns, kGroupColumns, kTileColumns};
}

// x of `call` is what `quantize` writes, if there is one: each thread quantizes the rows that it packs.
template <bool int4>
TARGET int Multiply(const LqMatmul& call, const LqQuantize* quantize) {
  const int64_t m = call.m, threads = call.threads;
  const Way way = WayOf(call);
  const bool many = way == Way::kManyRows;
  const int64_t padded = (call.row_bytes + kBlock - 1) / kBlock * kValues<int4>;
  const int64_t panels = (m + kPanel - 1) / kPanel;
  const int64_t stride = many ? panels * kPanel : padded + 64;
  const auto shares = Allocate<TileScheduler::Share>(threads);
  if (!shares) return kNoMemory;
  TileScheduler tiles(call, TilesOf(call, way), shares.get());
  const int64_t own_sums = many ? std::min(kTileRows, panels * kPanel) * tiles.MaxColumns()
                           : way == Way::kPrepared ? std::min(kTileRows, m) * kGroupColumns
                                                   : m * kBlockColumns;
  const auto copy = Allocate<int8_t>(many ? stride * padded : m * stride);
  const auto compensation = Allocate<int32_t>(panels * kPanel);
  const auto sums = Allocate<int32_t>(threads * own_sums);
  const auto copies = Allocate<uint8_t>(many ? threads * kPackedBytes : 0);
  if (!copy || !compensation || !sums || !copies) return kNoMemory;
  const PackedX x{copy.get(), stride, compensation.get()};

  const auto copy_part = [&](int64_t number, int64_t count) {
    const int64_t all = many ? panels : m;
    for (int64_t i = all * number / count; i < all * (number + 1) / count; ++i) {
      const int64_t top = many ? i * kPanel : i, bottom = many ? std::min(m, top + kPanel) : i + 1;
      if (quantize) QuantizeRows(*quantize, top, bottom);
      if (many)
        PackPanel<int4>(call, top, x);
      else
        x.compensation[i] =
            PackRow<int4>(call.x + i * call.x_stride, call.row_bytes, x.x + i * stride);
    }
  };
  const auto compute_part = [&](int64_t number) {
    int32_t* const own = sums.get() + number * own_sums;
    if (many)
      ManyRows<int4>(call, x, &tiles, number, copies.get() + number * kPackedBytes, own);
    else if (way == Way::kPrepared)
      Prepared<int4>(call, x, &tiles, number, own);
    else
      FewRows<int4>(call, x, &tiles, number, own);
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

void Prepare(const LqMatmul& call, uint8_t* out) {
  const int64_t groups = (call.n + kGroupColumns - 1) / kGroupColumns;
  const int64_t threads = call.threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t group = 0; group < groups; ++group)
    PrepareGroup(call, group, out + group * GroupStride(call));
}

int Matmul(const LqMatmul& call) {
  return call.int4 ? Multiply<true>(call, nullptr) : Multiply<false>(call, nullptr);
}

int Layer(const LqLayer& layer) {
  LqQuantize quantize = layer.quantize;
  LqMatmul call = layer.matmul;
  const bool dynamic = quantize.arithmetic != LqArithmetic::kStatic;
  const auto values = Allocate<uint8_t>(call.m * call.row_bytes);
  const auto scale = Allocate<float>(dynamic ? call.m : 0);
  if (!values || !scale) return kNoMemory;
  quantize.out = values.get();
  quantize.scale = scale.get();
  call.x = values.get();
  call.x_stride = call.row_bytes;
  if (dynamic) call.pertoken = scale.get();
  return call.int4 ? Multiply<true>(call, &quantize) : Multiply<false>(call, &quantize);
}

int Quantize(const LqQuantize& call) {
  if (call.threads == 1) {
    QuantizeRows(call, 0, call.m);
    return kDone;
  }
#pragma omp parallel num_threads(call.threads)
  {
    const int64_t number = omp_get_thread_num(), count = omp_get_num_threads();
    QuantizeRows(call, call.m * number / count, call.m * (number + 1) / count);
  }
  return kDone;
}

}  // namespace

// `name` of targets.h; IsSupported is defined before.
#define LQ_DEFINE_TARGET(name)                                                 \
  extern const LqTarget kTarget_##name{#name, IsSupported,   Matmul, Quantize, \
                                       Layer, PreparedBytes, Prepare};

#endif  // LQ_GRAPH_RUN_H_
