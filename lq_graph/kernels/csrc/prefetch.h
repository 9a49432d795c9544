// Prefetch of what comes next: rows of w, and lines of the result.
#ifndef LQ_GRAPH_PREFETCH_H_
#define LQ_GRAPH_PREFETCH_H_
#include <immintrin.h>

#include <cstdint>

#include "call.h"
#include "tile.h"

namespace {

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

// Brings what will be written of `out` to the caches.
VNNI void PrefetchOutput(const LqMatmul& call, const Tile& tile) {
  const int64_t width = call.output == 0 ? 4 : call.output == 1 ? 1 : 2;
  for (int64_t row = tile.top; row < tile.bottom; ++row) {
    char* const out = static_cast<char*>(call.out) + row * call.n * width;
    for (int64_t at = tile.left * width; at < tile.right * width; at += 64)
      __builtin_prefetch(out + at, 1);
  }
}

}  // namespace

#endif  // LQ_GRAPH_PREFETCH_H_
