// Checkpoint rows -> ROM tiles: a permutation of bits, nothing is rounded.
#include <algorithm>
#include <cstring>

#include "tiles.h"

namespace vai::burn {
namespace {

std::uint64_t load64(const std::uint8_t* from) {
  std::uint64_t value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

void store32(std::uint8_t* to, std::uint64_t value) {
  const auto low = static_cast<std::uint32_t>(value);
  std::memcpy(to, &low, sizeof low);
}

// Four rows at a time: 16 bytes of each, as dwords, become 4 dwords of each of 4 lines. Compilers make single
// instructions of these on every machine with 128-bit vectors.
using Quad = std::uint32_t __attribute__((vector_size(16)));

Quad load_quad(const std::uint8_t* from) {
  Quad value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

void store_quad(std::uint8_t* to, Quad value) { std::memcpy(to, &value, sizeof value); }

struct Quads {
  Quad at[4];
};

// at[j] = dword j of the 16 bytes at `source` in each of four rows.
Quads load_columns(const std::uint8_t* source, std::size_t stride) {
  const Quad a = load_quad(source), b = load_quad(source + stride);
  const Quad c = load_quad(source + 2 * stride), d = load_quad(source + 3 * stride);
  const Quad ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Quad cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return {{__builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5), __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7),
           __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5),
           __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7)}};
}

// Each format says where one group of one row goes (put), and of four rows (put_four): `group` within the tile, `lane`
// 0..15 or the first of four. A line is 64 bytes.

struct Q4_0 {
  static constexpr Type kType = Type::kQ4_0;

  // Source: fp16 scale, 16 bytes whose low nibbles are elements 0..15 and high nibbles 16..31. A line holds 8 elements
  // of every row, byte b of a dword having element b low and element 4 + b high: so lines 0, 1 of a group take the low
  // nibbles of 8 source bytes, lines 2, 3 the high ones, each folding the upper 4 bytes onto the lower.
  static void put(const std::uint8_t* source, std::size_t group, std::size_t lane, std::uint8_t* tile) {
    constexpr std::uint64_t kLow = 0x0f0f0f0f0f0f0f0f;
    std::memcpy(tile + 32 * group + 2 * lane, source, 2);
    std::uint8_t* line = tile + kLine * (1 + 4 * group) + 4 * lane;
    for (std::size_t half = 0; half < 2; ++half) {
      const std::uint64_t codes = load64(source + 2 + 8 * half);
      const std::uint64_t low = codes & kLow, high = (codes >> 4) & kLow;
      store32(line + kLine * half, low | low >> 28);
      store32(line + kLine * (2 + half), high | high >> 28);
    }
  }

  static void put_four(const std::uint8_t* source, std::size_t stride, std::size_t group, std::size_t lane,
                       std::uint8_t* tile) {
    for (std::size_t row = 0; row < 4; ++row) {
      std::memcpy(tile + 32 * group + 2 * (lane + row), source + row * stride, 2);
    }
    const Quads codes = load_columns(source + 2, stride);
    const Quad low = Quad{} + 0x0f0f0f0f, high = Quad{} + 0xf0f0f0f0;
    std::uint8_t* line = tile + kLine * (1 + 4 * group) + 4 * lane;
    for (std::size_t half = 0; half < 2; ++half) {
      const Quad a = codes.at[2 * half], b = codes.at[2 * half + 1];
      store_quad(line + kLine * half, (a & low) | ((b & low) << 4));
      store_quad(line + kLine * (2 + half), ((a >> 4) & low) | (b & high));
    }
  }
};

struct Q8_0 {
  static constexpr Type kType = Type::kQ8_0;

  static void put(const std::uint8_t* source, std::size_t group, std::size_t lane, std::uint8_t* tile) {
    std::memcpy(tile + 32 * group + 2 * lane, source, 2);
    std::uint8_t* line = tile + kLine * (1 + 8 * group) + 4 * lane;
    for (std::size_t pair = 0; pair < 4; ++pair) {
      const std::uint64_t codes = load64(source + 2 + 8 * pair) ^ 0x8080808080808080;
      store32(line + kLine * 2 * pair, codes);
      store32(line + kLine * (2 * pair + 1), codes >> 32);
    }
  }

  static void put_four(const std::uint8_t* source, std::size_t stride, std::size_t group, std::size_t lane,
                       std::uint8_t* tile) {
    for (std::size_t row = 0; row < 4; ++row) {
      std::memcpy(tile + 32 * group + 2 * (lane + row), source + row * stride, 2);
    }
    std::uint8_t* line = tile + kLine * (1 + 8 * group) + 4 * lane;
    for (std::size_t half = 0; half < 2; ++half) {
      const Quads codes = load_columns(source + 2 + 16 * half, stride);
      for (std::size_t i = 0; i < 4; ++i) store_quad(line + kLine * (4 * half + i), codes.at[i] ^ 0x80808080);
    }
  }
};

template <Type type>
struct Plain {
  static constexpr Type kType = type;

  static void put(const std::uint8_t* source, std::size_t, std::size_t lane, std::uint8_t* tile) {
    for (std::size_t pair = 0; pair < 8; ++pair) {
      const std::uint64_t values = load64(source + 8 * pair);
      store32(tile + kLine * 2 * pair + 4 * lane, values);
      store32(tile + kLine * (2 * pair + 1) + 4 * lane, values >> 32);
    }
  }

  static void put_four(const std::uint8_t* source, std::size_t stride, std::size_t, std::size_t lane,
                       std::uint8_t* tile) {
    for (std::size_t quarter = 0; quarter < 4; ++quarter) {
      const Quads values = load_columns(source + 16 * quarter, stride);
      for (std::size_t i = 0; i < 4; ++i) store_quad(tile + kLine * (4 * quarter + i) + 4 * lane, values.at[i]);
    }
  }
};

// Exact: every fp16 value, subnormals, infinities and NaN payloads included, is a binary32 value.
std::uint32_t widen_f16(std::uint32_t half) {
  const std::uint32_t sign = (half & 0x8000) << 16, exponent = half >> 10 & 0x1f;
  std::uint32_t mantissa = half & 0x3ff;
  if (exponent == 31) return sign | 0x7f800000 | mantissa << 13;
  if (exponent > 0) return sign | (exponent + 112) << 23 | mantissa << 13;
  if (mantissa == 0) return sign;
  std::uint32_t scale = 113;
  for (; (mantissa & 0x400) == 0; mantissa <<= 1) --scale;
  return sign | scale << 23 | (mantissa & 0x3ff) << 13;
}

template <Type type>
struct Vector {
  static constexpr Type kType = type;

  static void put(const std::uint8_t* source, std::size_t, std::size_t lane, std::uint8_t* tile) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, source, layout_of(type).group_bytes);
    if constexpr (type == Type::kVectorF16) bits = widen_f16(bits);
    if constexpr (type == Type::kVectorBF16) bits <<= 16;
    store32(tile + 4 * lane, bits);
  }

  static void put_four(const std::uint8_t* source, std::size_t stride, std::size_t group, std::size_t lane,
                       std::uint8_t* tile) {
    for (std::size_t row = 0; row < 4; ++row) put(source + row * stride, group, lane + row, tile);
  }
};

template <class Format>
void pack_whole(const Rows& rows, std::size_t tile, std::uint8_t* target) {
  constexpr Layout k = layout_of(Format::kType);
  const std::uint8_t* source = rows.data + tile * k.groups * k.group_bytes;
  for (std::size_t lane = 0; lane < kLanes; lane += 4, source += 4 * rows.bytes) {
    for (std::size_t group = 0; group < k.groups; ++group) {
      Format::put_four(source + group * k.group_bytes, rows.bytes, group, lane, target);
    }
  }
}

// A tile at the edge: lanes, groups or trailing values are missing and become zeros.
template <class Format>
void pack_partial(const Rows& rows, std::size_t tile, std::uint8_t* target) {
  constexpr Layout k = layout_of(Format::kType);
  std::memset(target, 0, k.tile_bytes);
  for (std::size_t lane = 0; lane < rows.count; ++lane) {
    for (std::size_t group = 0; group < k.groups; ++group) {
      const std::size_t start = (tile * k.groups + group) * k.group_bytes;
      if (start >= rows.bytes) continue;
      std::uint8_t whole[k.group_bytes] = {};
      std::memcpy(whole, rows.data + lane * rows.bytes + start, std::min(k.group_bytes, rows.bytes - start));
      Format::put(whole, group, lane, target);
    }
  }
}

template <class Format>
void pack_all(const Rows& rows, std::size_t first, std::size_t last, std::uint8_t* target) {
  constexpr Layout k = layout_of(Format::kType);
  for (std::size_t tile = first; tile < last; ++tile, target += k.tile_bytes) {
    if (rows.count == kLanes && (tile + 1) * k.groups * k.group_bytes <= rows.bytes) {
      pack_whole<Format>(rows, tile, target);
    } else {
      pack_partial<Format>(rows, tile, target);
    }
  }
}

}  // namespace

void pack_tiles(Type type, const Rows& rows, std::size_t first, std::size_t last, std::uint8_t* target) {
  switch (type) {
    case Type::kQ4_0: return pack_all<Q4_0>(rows, first, last, target);
    case Type::kQ8_0: return pack_all<Q8_0>(rows, first, last, target);
    case Type::kF16: return pack_all<Plain<Type::kF16>>(rows, first, last, target);
    case Type::kF32: return pack_all<Plain<Type::kF32>>(rows, first, last, target);
    case Type::kVectorF16: return pack_all<Vector<Type::kVectorF16>>(rows, first, last, target);
    case Type::kVectorBF16: return pack_all<Vector<Type::kVectorBF16>>(rows, first, last, target);
    case Type::kVectorF32: return pack_all<Vector<Type::kVectorF32>>(rows, first, last, target);
  }
}

}  // namespace vai::burn
