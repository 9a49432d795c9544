// Where things lie: the rows of w, and which kernel a call takes.
#ifndef LQ_GRAPH_GEOMETRY_H_
#define LQ_GRAPH_GEOMETRY_H_
#include <cstdint>

#include "call.h"

namespace {

bool HasManyRows(const LqMatmul& call) { return call.m >= kManyRows; }

// Address of byte `from`, a multiple of 64, of row `row` of w.
inline const uint8_t* WeightAt(const LqMatmul& call, int64_t row, int64_t from) {
  return call.w + row * call.w_stride + from / 32 * call.w_step;
}

bool IsNz(const LqMatmul& call) { return call.w_step != 32; }

}  // namespace

#endif  // LQ_GRAPH_GEOMETRY_H_
