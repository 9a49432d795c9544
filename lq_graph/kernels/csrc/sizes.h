// Sizes of blocks, slices and tiles, the same for all instruction sets. isa/ has the others.
#ifndef LQ_GRAPH_SIZES_H_
#define LQ_GRAPH_SIZES_H_
#include <cstdint>

namespace {

constexpr int64_t kBlock = 64;  // bytes of a row of w that are multiplied in one step

// Few rows: w is read as it is stored. A register holds values along k, and its lanes are summed at the
// end. kRows rows of x are in one block of registers.
constexpr int kColumns = 4;               // rows of w in a block: columns of the result
constexpr int64_t kBlockColumns = 64;     // columns of the result in a slice
constexpr int64_t kCacheBytes = 1 << 16;  // a w of at most this size stays in a cache after its use
constexpr int64_t kRowAhead = 2048;       // bytes from what is read of one row of w to what is prefetched
// Bytes of a row of w in a slice: for one row of x, for one block of rows, for several blocks. x's part
// of that length stays in L1. w is read fastest in the order of memory, but several blocks read it again.
constexpr int64_t kDepthOneRow = 16384, kDepthOneBlock = 4096, kDepthManyBlocks = 2048;

// Many rows: x is transposed once. A register holds values along m, so no lanes are summed. w is read in
// words of four bytes from a packed copy of a few rows: rows at a distance of a multiple of 4096 bytes
// would compete for the same lines of the L1 cache.
constexpr int64_t kPanel = kLanes;    // rows of x in a register
constexpr int64_t kLineColumns = 32;  // columns stored together: 64 bytes of 16-bit results
// Rows and columns of a tile, at most: a slice of x and all sums of the tile stay in L2.
constexpr int64_t kTileRows = 256, kTileColumns = 256;

// From this number of rows on, a prepared weight is used.
constexpr int64_t kPreparedRows = 16;

}  // namespace

#endif  // LQ_GRAPH_SIZES_H_
