// AMX's instructions in plain C++, in the place of csrc/ops/fast/tile_instructions.h: each thread has eight tiles. Written from
// the operations in Intel's Software Developer's Manual (volume 1, chapter 18, and volume 2).
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct Tile {
  int rows = 0, bytes = 0;  // as configured: what an instruction reads or computes; the rest is zeros
  alignas(64) uint8_t row[16][64] = {};
};

struct Tiles {
  bool configured = false;
  Tile tile[8];
};

inline thread_local Tiles tiles;

// What a processor would end the process for.
inline void demand(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "emulated AMX: %s\n", what);
  std::abort();
}

inline Tile& tile(int index) {
  demand(tiles.configured, "tiles are used that are not configured");
  demand(tiles.tile[index].rows > 0 && tiles.tile[index].bytes > 0, "a tile is used that has no rows");
  return tiles.tile[index];
}

inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

inline float from_bfloat16(const uint8_t* p) {
  uint16_t upper;
  std::memcpy(&upper, p, sizeof upper);
  return flushed(std::bit_cast<float>(uint32_t(upper) << 16));
}

// sum + a * b in one rounding, DAZ and FTZ. A result is small, and flushed, if it is so when it is rounded to 24 bits whatever
// its exponent: what becomes the smallest normal number for lack of a smaller exponent is looked at again, 2^64 times as large.
inline float fused(float sum, float a, float b) {
  const float result = std::fma(a, b, sum);
  if (std::fabs(result) != 0x1p-126f) return flushed(result);
  const float scaled = std::fabs(a) < 1 ? std::fma(a * 0x1p64f, b, sum * 0x1p64f) : std::fma(a, b * 0x1p64f, sum * 0x1p64f);
  return std::fabs(scaled) < 0x1p-62f ? std::copysign(0.0f, result) : result;
}

}  // namespace emulated

namespace vai {
namespace {

// LDTILECFG
inline void load_config(const uint8_t (&config)[64]) {
  using emulated::demand, emulated::tiles;
  tiles = {};
  if (config[0] == 0) return;
  demand(config[0] == 1 && config[1] == 0, "a palette that there is not");
  for (int i = 2; i < 64; ++i) demand((i >= 16 && i < 32) || (i >= 48 && i < 56) || config[i] == 0, "a reserved byte is set");
  for (int i = 0; i < 8; ++i) {
    emulated::Tile& tile = tiles.tile[i];
    tile.bytes = config[16 + 2 * i] | config[17 + 2 * i] << 8, tile.rows = config[48 + i];
    demand(tile.bytes <= 64 && tile.rows <= 16 && (tile.bytes == 0) == (tile.rows == 0), "a tile of a shape that there is not");
  }
  tiles.configured = true;
}

// TILERELEASE
inline void release() { emulated::tiles = {}; }

// TILEZERO
template <int index>
inline void zero() { std::memset(emulated::tile(index).row, 0, sizeof emulated::Tile::row); }

// TILELOADD
template <int index>
inline void load(const void* p, size_t stride) {
  emulated::Tile& tile = emulated::tile(index);
  zero<index>();
  for (int m = 0; m < tile.rows; ++m) std::memcpy(tile.row[m], static_cast<const uint8_t*>(p) + size_t(m) * stride, size_t(tile.bytes));
}

// TILELOADDT1
template <int index>
inline void load_passing(const void* p, size_t stride) { load<index>(p, stride); }

// TILESTORED
template <int index>
inline void store(void* p, size_t stride) {
  const emulated::Tile& tile = emulated::tile(index);
  for (int m = 0; m < tile.rows; ++m) std::memcpy(static_cast<uint8_t*>(p) + size_t(m) * stride, tile.row[m], size_t(tile.bytes));
}

// TDPBF16PS
template <int sums, int activations, int weights>
inline void multiply() {
  emulated::Tile& c = emulated::tile(sums);
  const emulated::Tile &a = emulated::tile(activations), &b = emulated::tile(weights);
  const int pairs = a.bytes / 4, columns = c.bytes / 4;
  emulated::demand(a.rows == c.rows && b.bytes == c.bytes && b.rows == pairs && a.bytes % 4 == 0 && c.bytes % 4 == 0,
                   "tiles are multiplied that do not fit");
  for (int m = 0; m < c.rows; ++m) {
    float even[16] = {}, odd[16] = {}, before[16], after[16] = {};
    for (int k = 0; k < pairs; ++k) {
      const float first = emulated::from_bfloat16(a.row[m] + 4 * k), second = emulated::from_bfloat16(a.row[m] + 4 * k + 2);
      for (int n = 0; n < columns; ++n) {
        even[n] = emulated::fused(even[n], first, emulated::from_bfloat16(b.row[k] + 4 * n));
        odd[n] = emulated::fused(odd[n], second, emulated::from_bfloat16(b.row[k] + 4 * n + 2));
      }
    }
    std::memcpy(before, c.row[m], sizeof before);
    for (int n = 0; n < columns; ++n)
      after[n] = emulated::flushed(emulated::flushed(before[n]) + emulated::flushed(even[n] + odd[n]));
    std::memcpy(c.row[m], after, sizeof after);  // with zeros behind the columns
  }
  for (int m = c.rows; m < 16; ++m) std::memset(c.row[m], 0, 64);
}

// TDPBSSD, TDPBSUD
template <int sums, int activations, int weights, bool kUnsigned = false>
inline void dot() {
  emulated::Tile& c = emulated::tile(sums);
  const emulated::Tile &a = emulated::tile(activations), &b = emulated::tile(weights);
  const int fours = a.bytes / 4, columns = c.bytes / 4;
  emulated::demand(a.rows == c.rows && b.bytes == c.bytes && b.rows == fours && a.bytes % 4 == 0 && c.bytes % 4 == 0,
                   "tiles are multiplied that do not fit");
  for (int m = 0; m < c.rows; ++m)
    for (int n = 0; n < columns; ++n) {
      uint32_t sum;
      std::memcpy(&sum, c.row[m] + 4 * n, sizeof sum);
      for (int k = 0; k < fours; ++k)
        for (int i = 0; i < 4; ++i)
          sum += uint32_t(int32_t(int8_t(a.row[m][4 * k + i])) *
                          (kUnsigned ? int32_t(b.row[k][4 * n + i]) : int32_t(int8_t(b.row[k][4 * n + i]))));
      std::memcpy(c.row[m] + 4 * n, &sum, sizeof sum);
    }
  for (int m = 0; m < c.rows; ++m) std::memset(c.row[m] + 4 * columns, 0, size_t(64 - 4 * columns));
  for (int m = c.rows; m < 16; ++m) std::memset(c.row[m], 0, 64);
}

}  // namespace
}  // namespace vai
