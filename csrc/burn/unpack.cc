// ROM tiles -> checkpoint rows, and the proof that a tile holds what its source holds.
#include <algorithm>
#include <cstring>

#include "tiles.h"

namespace vai::burn {
namespace {

std::uint32_t load32(const std::uint8_t* from) {
  std::uint32_t value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

std::uint64_t load64(const std::uint8_t* from) {
  std::uint64_t value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

std::uint64_t load16(const std::uint8_t* from) {
  std::uint16_t value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

void store64(std::uint8_t* to, std::uint64_t value) { std::memcpy(to, &value, sizeof value); }

// Each format reads one group of one row out of a tile in the source's own form, `codes` being 8 bytes of it at a time.
// kAbsent is the byte its codes have where the tile's stored bytes are zero.

struct Q4_0 {
  static constexpr Type kType = Type::kQ4_0;
  static constexpr std::uint8_t kAbsent = 0;
  static constexpr std::size_t kScale = 2;  // bytes of scale in front of the codes

  static std::uint64_t eight(const std::uint8_t* line) {
    const std::uint32_t pairs = load32(line);
    return (pairs & 0x0f0f0f0f) | static_cast<std::uint64_t>((pairs >> 4) & 0x0f0f0f0f) << 32;
  }

  static std::uint64_t codes(const std::uint8_t* tile, std::size_t group, std::size_t lane, std::size_t index) {
    const std::uint8_t* line = tile + kLine * (1 + 4 * group + index) + 4 * lane;
    return eight(line) | eight(line + 2 * kLine) << 4;
  }
};

struct Q8_0 {
  static constexpr Type kType = Type::kQ8_0;
  static constexpr std::uint8_t kAbsent = 0x80;
  static constexpr std::size_t kScale = 2;

  static std::uint64_t codes(const std::uint8_t* tile, std::size_t group, std::size_t lane, std::size_t index) {
    const std::uint8_t* line = tile + kLine * (1 + 8 * group + 2 * index) + 4 * lane;
    return (load32(line) | static_cast<std::uint64_t>(load32(line + kLine)) << 32) ^ 0x8080808080808080;
  }
};

template <Type type>
struct Plain {
  static constexpr Type kType = type;
  static constexpr std::uint8_t kAbsent = 0;
  static constexpr std::size_t kScale = 0;

  static std::uint64_t codes(const std::uint8_t* tile, std::size_t, std::size_t lane, std::size_t index) {
    const std::uint8_t* line = tile + kLine * 2 * index + 4 * lane;
    return load32(line) | static_cast<std::uint64_t>(load32(line + kLine)) << 32;
  }
};

// An element of a vector, binary32 -> the source's form; bits that form has no place for go to `lost`.
template <Type type>
struct Vector {
  static constexpr Type kType = type;
  static constexpr std::uint8_t kAbsent = 0;
  static constexpr std::size_t kScale = 0;

  static std::uint32_t narrow_f16(std::uint32_t bits, std::uint32_t& lost) {
    const std::uint32_t sign = bits >> 16 & 0x8000, exponent = bits >> 23 & 0xff, mantissa = bits & 0x7fffff;
    if (exponent == 0) return lost = mantissa, sign;
    if (exponent > 142 && exponent < 255) return lost = bits, sign;
    if (exponent < 103) return lost = bits, sign;
    if (exponent > 112) {
      lost = mantissa & 0x1fff;
      return sign | (exponent == 255 ? 31 : exponent - 112) << 10 | mantissa >> 13;
    }
    const std::uint32_t shift = 126 - exponent, whole = mantissa | 0x800000;
    lost = whole & ((1u << shift) - 1);
    return sign | whole >> shift;
  }

  static std::uint32_t narrow(const std::uint8_t* tile, std::size_t lane, std::uint32_t& lost) {
    const std::uint32_t bits = load32(tile + 4 * lane);
    lost = 0;
    if constexpr (type == Type::kVectorF16) return narrow_f16(bits, lost);
    if constexpr (type == Type::kVectorBF16) return lost = bits & 0xffff, bits >> 16;
    return bits;
  }
};

template <class Format>
constexpr bool kIsVector = layout_of(Format::kType).columns == 1;

template <class Format>
void take(const std::uint8_t* tile, std::size_t group, std::size_t lane, std::uint8_t* out) {
  constexpr Layout k = layout_of(Format::kType);
  if constexpr (kIsVector<Format>) {
    std::uint32_t lost;
    const std::uint32_t bits = Format::narrow(tile, lane, lost);
    std::memcpy(out, &bits, k.group_bytes);
  } else {
    if constexpr (Format::kScale > 0) std::memcpy(out, tile + 32 * group + 2 * lane, Format::kScale);
    for (std::size_t i = 0; i < (k.group_bytes - Format::kScale) / 8; ++i) {
      store64(out + Format::kScale + 8 * i, Format::codes(tile, group, lane, i));
    }
  }
}

// The bits in which a stored group and a source group differ, all folded onto each other: 0 means equal.
template <class Format>
std::uint64_t difference(const std::uint8_t* tile, std::size_t group, std::size_t lane, const std::uint8_t* source) {
  constexpr Layout k = layout_of(Format::kType);
  if constexpr (kIsVector<Format>) {
    std::uint32_t lost, expected = 0;
    std::memcpy(&expected, source, k.group_bytes);
    const std::uint32_t bits = Format::narrow(tile, lane, lost);
    return (bits ^ expected) | lost;
  } else {
    std::uint64_t bits = 0;
    if constexpr (Format::kScale > 0) bits = load16(tile + 32 * group + 2 * lane) ^ load16(source);
    for (std::size_t i = 0; i < (k.group_bytes - Format::kScale) / 8; ++i) {
      bits |= Format::codes(tile, group, lane, i) ^ load64(source + Format::kScale + 8 * i);
    }
    return bits;
  }
}

// What a group outside the source looks like when taken: a zero scale (the quantized types) and absent codes.
template <class Format>
void absent(std::uint8_t* out) {
  constexpr Layout k = layout_of(Format::kType);
  std::memset(out, Format::kAbsent, k.group_bytes);
  std::memset(out, 0, Format::kScale);
}

template <class Format>
bool holds_whole(const Rows& rows, std::size_t tile, const std::uint8_t* packed) {
  constexpr Layout k = layout_of(Format::kType);
  const std::uint8_t* source = rows.data + tile * k.groups * k.group_bytes;
  std::uint64_t bits = 0;
  for (std::size_t lane = 0; lane < kLanes; ++lane, source += rows.bytes) {
    for (std::size_t group = 0; group < k.groups; ++group) {
      bits |= difference<Format>(packed, group, lane, source + group * k.group_bytes);
    }
  }
  return bits == 0;
}

template <class Format>
bool holds_partial(const Rows& rows, std::size_t tile, const std::uint8_t* packed) {
  constexpr Layout k = layout_of(Format::kType);
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    for (std::size_t group = 0; group < k.groups; ++group) {
      const std::size_t start = (tile * k.groups + group) * k.group_bytes;
      std::uint8_t expected[k.group_bytes];
      absent<Format>(expected);
      if (lane < rows.count && start < rows.bytes) {
        std::memcpy(expected, rows.data + lane * rows.bytes + start, std::min(k.group_bytes, rows.bytes - start));
      }
      if (difference<Format>(packed, group, lane, expected) != 0) return false;
    }
  }
  return true;
}

template <class Format>
bool holds_all(const Rows& rows, std::size_t first, std::size_t last, const std::uint8_t* packed) {
  constexpr Layout k = layout_of(Format::kType);
  bool equal = true;
  for (std::size_t tile = first; tile < last; ++tile, packed += k.tile_bytes) {
    const bool whole = rows.count == kLanes && (tile + 1) * k.groups * k.group_bytes <= rows.bytes;
    equal &= whole ? holds_whole<Format>(rows, tile, packed) : holds_partial<Format>(rows, tile, packed);
  }
  return equal;
}

template <class Format>
void unpack_all(const std::uint8_t* packed, std::size_t bytes, std::size_t count, std::uint8_t* out) {
  constexpr Layout k = layout_of(Format::kType);
  for (std::size_t index = 0; index * k.group_bytes < bytes; ++index) {
    const std::size_t start = index * k.group_bytes;
    for (std::size_t lane = 0; lane < count; ++lane) {
      std::uint8_t taken[k.group_bytes];
      take<Format>(packed + index / k.groups * k.tile_bytes, index % k.groups, lane, taken);
      std::memcpy(out + lane * bytes + start, taken, std::min(k.group_bytes, bytes - start));
    }
  }
}

}  // namespace

void unpack_rows(Type type, const std::uint8_t* packed, std::size_t bytes, std::size_t count, std::uint8_t* out) {
  switch (type) {
    case Type::kQ4_0: return unpack_all<Q4_0>(packed, bytes, count, out);
    case Type::kQ8_0: return unpack_all<Q8_0>(packed, bytes, count, out);
    case Type::kF16: return unpack_all<Plain<Type::kF16>>(packed, bytes, count, out);
    case Type::kF32: return unpack_all<Plain<Type::kF32>>(packed, bytes, count, out);
    case Type::kVectorF16: return unpack_all<Vector<Type::kVectorF16>>(packed, bytes, count, out);
    case Type::kVectorBF16: return unpack_all<Vector<Type::kVectorBF16>>(packed, bytes, count, out);
    case Type::kVectorF32: return unpack_all<Vector<Type::kVectorF32>>(packed, bytes, count, out);
  }
}

bool holds(Type type, const Rows& rows, std::size_t first, std::size_t last, const std::uint8_t* packed) {
  switch (type) {
    case Type::kQ4_0: return holds_all<Q4_0>(rows, first, last, packed);
    case Type::kQ8_0: return holds_all<Q8_0>(rows, first, last, packed);
    case Type::kF16: return holds_all<Plain<Type::kF16>>(rows, first, last, packed);
    case Type::kF32: return holds_all<Plain<Type::kF32>>(rows, first, last, packed);
    case Type::kVectorF16: return holds_all<Vector<Type::kVectorF16>>(rows, first, last, packed);
    case Type::kVectorBF16: return holds_all<Vector<Type::kVectorBF16>>(rows, first, last, packed);
    case Type::kVectorF32: return holds_all<Vector<Type::kVectorF32>>(rows, first, last, packed);
  }
  return false;
}

}  // namespace vai::burn
