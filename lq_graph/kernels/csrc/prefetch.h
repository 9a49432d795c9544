// Prefetch: rows of w that are multiplied next, and lines of the output that are written next.
#ifndef LQ_GRAPH_PREFETCH_H_
#define LQ_GRAPH_PREFETCH_H_
#include <cstdint>

#include "call.h"
#include "tile.h"

namespace {

// Prefetches 64 bytes of a row of w; `step` is w_step.
template <bool nz>
INLINE_TARGET void Prefetch(const uint8_t* w, int64_t step) {
  __builtin_prefetch(w, 0, 3);
  if (nz) __builtin_prefetch(w + step, 0, 3);
}

// Rows of w to prefetch while others are multiplied: 0, 1, 2 or 4 of them.
struct PrefetchRows {
  const uint8_t* from;
  int64_t stride, rows;
};

// Prefetches the lines of the output that a tile is written to.
TARGET void PrefetchOutput(const LqMatmul& call, const Tile& tile) {
  const int64_t width = call.output == 0 ? 4 : call.output == 1 ? 1 : 2;
  for (int64_t row = tile.top; row < tile.bottom; ++row) {
    char* const out = static_cast<char*>(call.out) + row * call.n * width;
    for (int64_t at = tile.left * width; at < tile.right * width; at += 64)
      __builtin_prefetch(out + at, 1);
  }
}

}  // namespace

#endif  // LQ_GRAPH_PREFETCH_H_
