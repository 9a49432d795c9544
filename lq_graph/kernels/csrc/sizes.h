// Sizes of blocks, slices and tiles.
#ifndef LQ_GRAPH_SIZES_H_
#define LQ_GRAPH_SIZES_H_
#include <cstdint>

namespace {

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

}  // namespace

#endif  // LQ_GRAPH_SIZES_H_
