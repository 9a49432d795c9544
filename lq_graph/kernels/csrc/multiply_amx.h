// The product of a packed slice of w and one or two panels of x, in AMX's tile registers: eight
// registers of 16 rows of 64 bytes. What multiply.h does with vectors; the operands lie as it has them.
//
// TDPBUSD adds to word n of row m of the sums the products of bytes 4k to 4k + 3 of row m of the first
// operand, unsigned, and those of word n of row k of the second, signed, for all k. So m is a column of
// the result, n a row of x, and k a step: the first operand is 64 bytes of 16 rows of w, the second 16
// steps of a panel of x, and the sums are stored column by column.
//
// GCC does not know that a load of a tile register reads memory. It keeps the order all the same: what is
// loaded was written before this function was called, and a store of a tile register counts as a read
// and a write of all memory.
//
// Never run on hardware: tests/kernels/amx_emulator.cpp executes the instructions.
#ifndef LQ_GRAPH_MULTIPLY_AMX_H_
#define LQ_GRAPH_MULTIPLY_AMX_H_
#include <cstdint>

#include "pack.h"
#include "simd.h"
#include "sizes.h"

namespace {

constexpr int64_t kTileW = 16;      // rows of w in a tile register: columns of the result
constexpr int64_t kTileBytes = 64;  // of a row of a tile register

// panels * kPanel rows by groups * kTileW columns; the rest as in multiply.h. If there are fewer columns, the
// sums of the others are of no use, but the buffers have room for them. Sums are in registers 0 to 3,
// w in 4 and 5, x in 6 and 7: the intrinsics take nothing but numbers. With two panels and two groups,
// four loads serve four products, and no product waits for the one before it.
template <bool int4, int panels, int groups>
TARGET void MultiplySlice(const int8_t* x, int64_t x_panel, const uint8_t* w, int64_t blocks,
                          const PackAhead& pack_ahead, bool first, int32_t* c, int64_t c_stride) {
  constexpr int64_t kToGroup = kTileW * kSliceStride;
  int32_t* const c1 = c + kTileW * c_stride;
  const int64_t c_bytes = 4 * c_stride;
  _tile_zero(0);
  if constexpr (panels == 2) _tile_zero(1);
  if constexpr (groups == 2) _tile_zero(2);
  if constexpr (panels == 2 && groups == 2) _tile_zero(3);
  if (!first) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (panels == 2) _tile_loadd(1, c + kPanel, c_bytes);
    if constexpr (groups == 2) _tile_loadd(2, c1, c_bytes);
    if constexpr (panels == 2 && groups == 2) _tile_loadd(3, c1 + kPanel, c_bytes);
  }
  Packer<int4> packer(pack_ahead);
  for (int64_t block = 0; block < blocks; ++block) {
    packer.PackBlock(block);
    for (int part = 0; part < kParts<int4>; ++part) {
      _tile_loadd(4, w, kSliceStride);
      _tile_loadd(6, x, kTileBytes);
      if constexpr (panels == 2) _tile_loadd(7, x + x_panel, kTileBytes);
      if constexpr (groups == 2) _tile_loadd(5, w + kToGroup, kSliceStride);
      _tile_dpbusd(0, 4, 6);
      if constexpr (panels == 2) _tile_dpbusd(1, 4, 7);
      if constexpr (groups == 2) _tile_dpbusd(2, 5, 6);
      if constexpr (panels == 2 && groups == 2) _tile_dpbusd(3, 5, 7);
      x += kPanel * kTileBytes;
      w += kTileBytes;
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (panels == 2) _tile_stored(1, c + kPanel, c_bytes);
  if constexpr (groups == 2) _tile_stored(2, c1, c_bytes);
  if constexpr (panels == 2 && groups == 2) _tile_stored(3, c1 + kPanel, c_bytes);
}

// Columns that one call takes, at most.
template <int panels>
constexpr int64_t kColumnsOf = 2 * kTileW;

using SliceKernel = void (*)(const int8_t*, int64_t, const uint8_t*, int64_t, const PackAhead&,
                             bool, int32_t*, int64_t);
template <bool int4, int panels>
SliceKernel KernelFor(int64_t columns) {
  return columns > kTileW ? MultiplySlice<int4, panels, 2> : MultiplySlice<int4, panels, 1>;
}

// Palette 1: eight tile registers, their bytes in a row, then their rows.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};
constexpr TileConfig kTileConfig{
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// A thread that has not released its tile registers has 8 KB more to save when it is interrupted.
TARGET void BeginMultiply() { _tile_loadconfig(&kTileConfig); }
TARGET void EndMultiply() { _tile_release(); }

}  // namespace

#endif  // LQ_GRAPH_MULTIPLY_AMX_H_
