// Sizes of blocks, slices and tiles.
#ifndef LQ_GRAPH_SIZES_H_
#define LQ_GRAPH_SIZES_H_
#include <cstdint>

namespace {

// Few rows: w is read as it is stored. A register holds values along k, and its lanes are summed at the
// end.
// Rows of x in one block of registers. int4 needs two registers for each row of w, so fewer are left.
template <bool int4>
constexpr int kRows = int4 ? 4 : 6;
constexpr int kColumns = 4;               // rows of w in a block: columns of the result
constexpr int64_t kBlockColumns = 64;     // columns of the result in a slice
constexpr int64_t kCacheBytes = 1 << 20;  // a w of at most this size stays in a cache after its use
// Bytes of a row of w in a slice: for one row of x, for one block of rows, for several blocks. x's part
// of that length stays in L1. w is read fastest in the order of memory, but several blocks read it again.
constexpr int64_t kDepthOneRow = 16384, kDepthOneBlock = 4096, kDepthManyBlocks = 2048;

// Many rows: x is transposed once. A register holds values along m, so no lanes are summed. w is read in
// words of four values from a packed copy of a few rows: rows at a distance of a multiple of 4096 bytes
// would compete for the same lines of the L1 cache.
constexpr int64_t kManyRows = 32;
constexpr int64_t kPanel = 16;         // rows of x in a register
constexpr int kAccumulators = 16;      // registers: 16 rows of w by one panel of x, or 8 by two
constexpr int64_t kSliceColumns = 16;  // rows of w in a slice
constexpr int64_t kSliceDepth = 2048;  // values of k in a slice, at most
constexpr int64_t kLineColumns =
    32;  // columns that are stored together: 64 bytes of 16-bit results
// Rows and columns of a tile, at most: a slice of x and all sums of the tile stay in L2.
constexpr int64_t kTileRows = 256, kTileColumns = 256;

}  // namespace

#endif  // LQ_GRAPH_SIZES_H_
