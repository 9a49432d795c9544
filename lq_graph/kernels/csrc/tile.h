// The order of the work: threads take tiles of the result, and compute a tile from slices of w.
#ifndef LQ_GRAPH_TILE_H_
#define LQ_GRAPH_TILE_H_
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>

#include "call.h"
#include "geometry.h"
#include "sizes.h"

namespace {

// Some rows and columns of the result.
struct Tile {
  int64_t top, bottom, left, right;
};

// Hands out the tiles of the result. Each thread has a share of the columns, the same in each call, so
// its part of w may still be in its cache. A thread that has finished its share takes tiles from the
// others: cores of one machine differ in speed and in their distance from the memory that holds w.
class TileScheduler {
 public:
  struct alignas(64) Share {
    std::atomic<uint64_t> pieces;  // the first one left, and the end: 32 bits each
  };

  // How a kernel wants its tiles: at most `tall` rows, in multiples of `unit`; columns in multiples of
  // `step`, `wide` of them in a piece, at most `widest`.
  struct Shape {
    int64_t tall, unit, step, wide, widest;
  };

  // `shares` has one element for each thread.
  TileScheduler(const LqMatmul& call, const Shape& shape, Share* shares)
      : rows_(call.m), columns_(call.n), threads_(call.threads), shares_(shares) {
    const auto [tall, unit, step, wide, widest] = shape;
    // 1 to 4 pieces for each thread: a piece is about 10 us of work or more
    const int64_t each =
        std::clamp<int64_t>(call.m * call.n * call.row_bytes / threads_ >> 22, 1, 4);
    const int64_t steps = (columns_ + step * each * threads_ - 1) / (step * each * threads_);
    wide_ = std::min(wide, steps * step);
    across_ = (columns_ + wide_ - 1) / wide_;
    most_ = std::min(across_, std::max<int64_t>(1, widest / wide_));
    const int64_t times = std::max((rows_ + tall - 1) / tall, across_ < threads_ ? threads_ : 1);
    tall_ = (rows_ + times * unit - 1) / (times * unit) * unit;
    down_ = (rows_ + tall_ - 1) / tall_;
    for (int64_t i = 0; i < threads_; ++i)
      new (&shares_[i].pieces) std::atomic<uint64_t>(
          Pack(down_ * across_ * i / threads_, down_ * across_ * (i + 1) / threads_));
  }

  // Columns of a tile, at most.
  int64_t MaxColumns() const { return most_ * wide_; }

  // The next tile of a thread; a tile without columns at the end.
  Tile Next(int64_t thread) {
    for (int64_t i = 0; i < threads_; ++i) {
      std::atomic<uint64_t>& pieces = shares_[(thread + i) % threads_].pieces;
      uint64_t now = pieces.load(std::memory_order_relaxed);
      while (now >> 32 < (now & kLow)) {
        // half of the pieces that are left: from the front of its own share, or the end of another's
        const int64_t begin = now >> 32, end = now & kLow;
        const int64_t take = threads_ == 1 ? most_ : std::min(most_, (end - begin + 1) / 2);
        const Piece piece = PieceAt(i == 0 ? begin : end - 1);
        const int64_t from = i == 0 ? begin : std::max(end - take, piece.first);
        const int64_t to = i == 0 ? std::min(begin + take, piece.last) : end;
        if (!pieces.compare_exchange_weak(now, i == 0 ? Pack(to, end) : Pack(begin, from),
                                          std::memory_order_relaxed))
          continue;
        const int64_t left = (piece.across + from - piece.first) * wide_;
        return {piece.down * tall_, std::min(rows_, (piece.down + 1) * tall_), left,
                std::min(columns_, left + (to - from) * wide_)};
      }
    }
    return {};
  }

 private:
  static constexpr uint64_t kLow = 0xFFFFFFFF;
  static uint64_t Pack(int64_t begin, int64_t end) { return uint64_t(begin) << 32 | uint64_t(end); }

  // A piece is the smallest tile: tall_ rows, wide_ columns. Pieces are numbered from left to right over
  // the columns of the widest tile (most_ pieces), then downwards, then on to the next columns.
  struct Piece {
    int64_t first, last;   // numbers of the pieces beside it that may be in one tile with it
    int64_t across, down;  // column and row of the first of them, counted in pieces
  };
  Piece PieceAt(int64_t number) const {
    const int64_t across = number / (most_ * down_) * most_, above = across * down_;
    const int64_t beside = std::min(most_, across_ - across), down = (number - above) / beside;
    return {above + down * beside, above + (down + 1) * beside, across, down};
  }

  int64_t rows_, columns_, threads_, tall_, wide_, most_, across_, down_;
  Share* shares_;
};

// Bytes of a row of w in each slice except the last. Slices are almost equally long: while one slice is
// multiplied the next comes from memory, and a short slice would leave little time for this.
template <bool int4>
int64_t SliceBytes(const LqMatmul& call) {
  const bool once = call.m <= kRows<int4>;
  int64_t most = call.m == 1 ? kDepthOneRow : once ? kDepthOneBlock : kDepthManyBlocks;
  if (HasManyRows(call)) {  // as long as x allows: the more of a row, the fewer changes of pages
    const int64_t values = std::min(kSliceDepth, kSliceOfX / std::min(call.m, kTileRows));
    most = values / kParts<int4> / kBlock * kBlock;
  }
  const int64_t blocks = (call.row_bytes + 63) / 64, slices = (blocks * 64 + most - 1) / most;
  return (blocks + slices - 1) / slices * 64;
}

// The bytes [from, from + depth) of some rows of w. These rows are the columns of `tile`, which has
// `before` columns of the scheduler's tile to its left. Once the slice is multiplied, the sums of
// `complete` are complete, if it has columns.
struct Slice {
  Tile tile;
  int64_t before, from, depth;
  Tile complete;
};

// The slices of one thread, in order.
template <bool int4>
class Slices {
 public:
  Slices(const LqMatmul& call, TileScheduler* tiles, int64_t thread)
      : many_(HasManyRows(call)),
        columns_(call.n),
        wide_(many_ ? kSliceColumns : kBlockColumns),
        bytes_(call.row_bytes),
        most_(SliceBytes<int4>(call)),
        deep_((bytes_ + most_ - 1) / most_),
        tiles_(tiles),
        thread_(thread) {}

  // The next slice; one without columns at the end.
  Slice Next() {
    if (number_ == across_ * deep_) {
      tile_ = tiles_->Next(thread_);
      across_ = (tile_.right - tile_.left + wide_ - 1) / wide_;
      number_ = 0;
    }
    return across_ ? At(number_++) : Slice{};
  }

  // The slice that probably comes `i` slices after the next: a guess, good enough for a prefetch. One
  // without columns if there is none.
  Slice Lookahead(int64_t i) const { return across_ ? At(number_ + i) : Slice{}; }

 private:
  // A slice of the tile; beyond its last, one of the columns to its right.
  Slice At(int64_t number) const {
    // With many rows the slices go over all columns first: the part of x they need stays in L2. With
    // few rows they go along k first: a row of w is read to its end.
    const int64_t beyond = number - across_ * deep_;
    int64_t column = number / deep_, from = number % deep_;
    if (many_) {
      column = beyond < 0 ? number % across_ : across_ + beyond;
      from = beyond < 0 ? number / across_ : 0;
    }
    from *= most_;
    const int64_t before = column * wide_, left = tile_.left + before;
    const int64_t end = beyond < 0 ? tile_.right : columns_;
    if (left >= end) return {};
    Slice slice{tile_, before, from, std::min(most_, bytes_ - from), {}};
    slice.tile.left = left;
    slice.tile.right = std::min(end, left + wide_);
    const int64_t written = std::max(wide_, kLineColumns);
    const bool fills = (before + wide_) % written == 0 || slice.tile.right == tile_.right;
    if (from + most_ >= bytes_ && fills) {
      slice.complete = slice.tile;
      slice.complete.left -= before % written;
    }
    return slice;
  }

  bool many_;
  int64_t columns_, wide_, bytes_, most_, deep_;
  TileScheduler* tiles_;
  int64_t thread_;
  Tile tile_{};
  int64_t across_ = 0, number_ = 0;
};

}  // namespace

#endif  // LQ_GRAPH_TILE_H_
