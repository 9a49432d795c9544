// Packing: copies of w and x in the order in which the kernels read them.
#ifndef LQ_GRAPH_PACK_H_
#define LQ_GRAPH_PACK_H_
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "call.h"
#include "geometry.h"
#include "simd.h"
#include "sizes.h"
#include "tile.h"

namespace {

// Bytes of the values of a block of w.
template <bool int4>
constexpr int64_t kValues = kParts<int4> * kBlock;

// Writes the values of a register of w, of the block's byte `at` on, to the copy of the block: first
// those of each register's first part, then those of the second.
template <bool int4>
INLINE_TARGET void UnpackWeight(Ints v, int64_t at, uint8_t* block) {
  Ints parts[kParts<int4>];
  Split<int4>(v, parts);
#pragma GCC unroll 2
  for (int part = 0; part < kParts<int4>; ++part) Store(block + part * kBlock + at, parts[part]);
}

// Rows of the next slice of w, to be packed while the present one is multiplied: on its own, packing
// would wait for memory.
struct PackAhead {
  const uint8_t* from;
  uint8_t* to;
  int64_t rows, row_step;  // their number, and the bytes from one to the next
  int64_t blocks;          // blocks of 64 bytes in each row
  int64_t w_step;          // as in LqMatmul
  // Bytes from here to the two slices after it, which are prefetched. So each slice is prefetched twice:
  // the processor drops one request in a few hundred.
  int64_t to_second, to_third;
};

// Does the pack-ahead, one block of each row after the other.
template <bool int4>
class Packer {
 public:
  // In the order of memory: block after block of a row, or in FRACTAL_NZ row after row of a block.
  INLINE_TARGET explicit Packer(const PackAhead& ahead)
      : ahead_(ahead),
        nz_(ahead.w_step != 32),
        run_(nz_ ? ahead.rows : ahead.blocks),
        step_(nz_ ? 32 : kBlock),
        to_step_(nz_ ? kSliceStride : kValues<int4>),
        next_run_((nz_ ? 2 * ahead.w_step : ahead.row_step) - run_ * step_),
        to_next_run_((nz_ ? kValues<int4> : kSliceStride) - run_ * to_step_),
        from_(ahead.from),
        to_(ahead.to),
        left_(run_) {}

  // As many blocks as there are rows, if there is a block of this number.
  INLINE_TARGET void PackBlock(int64_t number) {
    for (int64_t i = number < ahead_.blocks ? ahead_.rows : 0; i; --i) {
#pragma GCC unroll 4
      for (int64_t in = 0; in < kBlock; in += kBytes)
        UnpackWeight<int4>(
            nz_ ? LoadWeight<true>(from_, in, ahead_.w_step) : LoadWeight<false>(from_, in, 32), in,
            to_);
      const uint8_t *second = from_ + ahead_.to_second, *third = from_ + ahead_.to_third;
      __builtin_prefetch(second, 0, 3);
      if (nz_) __builtin_prefetch(second + ahead_.w_step, 0, 3);
      __builtin_prefetch(third, 0, 3);
      if (nz_) __builtin_prefetch(third + ahead_.w_step, 0, 3);
      from_ += step_;
      to_ += to_step_;
      if (--left_ == 0) {
        left_ = run_;
        from_ += next_run_;
        to_ += to_next_run_;
      }
    }
  }

 private:
  const PackAhead& ahead_;
  const bool nz_;
  const int64_t run_, step_, to_step_, next_run_, to_next_run_;
  const uint8_t* from_;
  uint8_t* to_;
  int64_t left_;
};

// The copy of x, as values that Dot takes. Few rows: each row is padded with zeros to a multiple of a
// block, and 64 bytes more lie between rows, because rows at a distance of a multiple of 4096 bytes would
// compete for the same lines of the L1 cache. Many rows: for each slice of k, its panels, as
// MultiplySlice reads them.
struct PackedX {
  int8_t* x;
  int64_t stride;  // few rows: bytes from row to row; many rows: bytes for each byte of a value
  int32_t* compensation;  // for each row, what kAdded adds to its sums
};

// Packs a slice of w for MultiplySlice, from byte `done` of each row on.
template <bool int4>
TARGET void PackSlice(const LqMatmul& call, const Slice& slice, int64_t done, uint8_t* out) {
  for (int64_t row = slice.tile.left; row < slice.tile.right; ++row, out += kSliceStride) {
    const uint8_t* const w = WeightAt(call, row, slice.from);
    for (int64_t at = done; at < slice.depth; at += kBlock)
      for (int64_t in = 0; in < kBlock; in += kBytes) {
        const int64_t left = slice.depth - at - in;
        Ints v{};
        if (!IsNz(call))
          v = LoadSome(w + at + in, left);
        else if (left > 0)  // its rows end in zeros up to a multiple of 32 bytes
          v = LoadNz(w + (at + in) / 32 * call.w_step + in % 32, left > 32 ? call.w_step : 0);
        UnpackWeight<int4>(v, in, out + at * kParts<int4>);
      }
  }
}

// Transposes a panel, kPanel rows of x from `top` on: for each slice of k, and for every four bytes of
// values in it, those four of each row. Writes the rows' compensation as well.
template <bool int4>
TARGET void PackPanel(const LqMatmul& call, int64_t top, const PackedX& x) {
  const int64_t most = SliceBytes<int4>(call);
  const int64_t height = std::min(kPanel, call.m - top);
  Ints total{};
  for (int64_t from = 0; from < call.row_bytes; from += most) {
    const int64_t depth = std::min(most, call.row_bytes - from);
    int8_t* out = x.x + from * kParts<int4> * x.stride +
                  top * ((depth + kBlock - 1) / kBlock * kValues<int4>);
    for (int64_t at = 0; at < depth; at += kBlock, out += kPanel * kValues<int4>)
      for (int64_t in = 0; in < kBlock; in += kBytes) {
        Ints parts[kParts<int4>][kLanes] = {};
        for (int64_t i = 0; i < height; ++i) {
          Ints of_row[kParts<int4>];
          SplitX<int4>(
              LoadSome(call.x + (top + i) * call.x_stride + from + at + in, depth - at - in),
              of_row);
          for (int part = 0; part < kParts<int4>; ++part) parts[part][i] = of_row[part];
        }
        for (int part = 0; part < kParts<int4>; ++part) {
          OrderX(parts[part]);
          int8_t* const to = out + (part * kBlock + in) * kPanel;
          for (int i = 0; i < kLanes; ++i) {
            Store(to + i * kBytes, parts[part][i]);
            if (kAdded<int4>) total = Dot<int4>(total, Set(0x01010101), parts[part][i]);
          }
        }
      }
  }
  Store(x.compensation + top, total * kAdded<int4>);
}

// Copies one row of x as values, padded; returns its compensation.
template <bool int4>
TARGET int32_t PackRow(const uint8_t* source, int64_t bytes, int8_t* row) {
  Ints total{};
  for (int64_t at = 0; at < bytes; at += kBlock)
    for (int64_t in = 0; in < kBlock; in += kBytes) {
      Ints parts[kParts<int4>];
      SplitX<int4>(LoadSome(source + at + in, bytes - at - in), parts);
      for (int part = 0; part < kParts<int4>; ++part) {
        Store(row + at * kParts<int4> + part * kBlock + in, parts[part]);
        if (kAdded<int4>) total = Dot<int4>(total, Set(0x01010101), parts[part]);
      }
    }
  return kAdded<int4> * Sum(total);
}

}  // namespace

#endif  // LQ_GRAPH_PACK_H_
