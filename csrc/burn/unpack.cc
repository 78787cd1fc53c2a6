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

std::uint16_t load16(const std::uint8_t* from) {
  std::uint16_t value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// Each format reads one group of one row out of a tile and says it in the source's own form: sink(at, word) is the word
// at byte `at` of the group, sink.lost(bits) are bits that form has no place for, all zero in a right tile.

// Writes the group.
struct Take {
  std::uint8_t* out;

  template <class Word>
  void operator()(std::size_t at, Word word) {
    std::memcpy(out + at, &word, sizeof word);
  }
  void lost(std::uint32_t) {}
};

// The bits in which the group differs from its source, all folded onto each other: 0 means equal.
struct Compare {
  const std::uint8_t* source;
  std::uint64_t bits = 0;

  template <class Word>
  void operator()(std::size_t at, Word word) {
    Word expected;
    std::memcpy(&expected, source + at, sizeof expected);
    bits |= static_cast<Word>(word ^ expected);
  }
  void lost(std::uint32_t extra) { bits |= extra; }
};

// 8 elements of a nibble line, a byte each.
std::uint64_t eight(const std::uint8_t* line) {
  const std::uint32_t pairs = load32(line);
  return (pairs & 0x0f0f0f0f) | static_cast<std::uint64_t>((pairs >> 4) & 0x0f0f0f0f) << 32;
}

// 8 source bytes: elements of one line in the low nibbles, of another in the high ones.
std::uint64_t nibbles(const std::uint8_t* low, const std::uint8_t* high) { return eight(low) | eight(high) << 4; }

// Four bytes that lie 16 apart.
std::uint32_t column(const std::uint8_t* from) {
  return static_cast<std::uint32_t>(from[0]) | static_cast<std::uint32_t>(from[16]) << 8 |
         static_cast<std::uint32_t>(from[32]) << 16 | static_cast<std::uint32_t>(from[48]) << 24;
}

// A dword of each of four rows.
using Quad = std::uint32_t __attribute__((vector_size(16)));

Quad load_quad(const std::uint8_t* from) {
  Quad value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <Type type, bool minimum, bool fifth>
struct Group32 {
  static constexpr Type kType = type;
  static constexpr std::size_t kBits = minimum ? 4 : 2, kCodes = kBits + (fifth ? 4 : 0), kLines = minimum ? 2 : 1;

  template <class Sink>
  static void read(const std::uint8_t* tile, std::size_t group, std::size_t lane, Sink& sink) {
    read_head(tile, group, lane, sink);
    const std::uint8_t* line = tile + kLine * (kLines + 4 * group) + 4 * lane;
    for (std::size_t i = 0; i < 2; ++i) sink(kCodes + 8 * i, nibbles(line + kLine * i, line + kLine * (2 + i)));
  }

  // All but the four bits of each element.
  template <class Sink>
  static void read_head(const std::uint8_t* tile, std::size_t group, std::size_t lane, Sink& sink) {
    sink(0, load16(tile + 32 * group + 2 * lane));
    if constexpr (minimum) sink(2, load16(tile + kLine + 32 * group + 2 * lane));
    if constexpr (fifth) sink(kBits, gather(load32(tile + kLine * (kLines + 8 + group) + 4 * lane)));
  }

  // The bits in which those four differ from the source, four rows at a time: this is most of what burning reads.
  static Quad differ(const std::uint8_t* tile, std::size_t group, std::size_t lane, const std::uint8_t* source,
                     std::size_t stride) {
    const std::uint8_t* line = tile + kLine * (kLines + 4 * group) + 4 * lane;
    const Quad a = load_quad(line), b = load_quad(line + kLine);
    const Quad c = load_quad(line + 2 * kLine), d = load_quad(line + 3 * kLine);
    const Quad lower = Quad{} + 0x0f0f0f0f, upper = ~lower;
    // Bytes 0..3 of each row, then 4..7, 8..11, 12..15; behind the shuffles, the 16 bytes of each row.
    const Quad first = (a & lower) | (c & lower) << 4, second = (a >> 4 & lower) | (c & upper);
    const Quad third = (b & lower) | (d & lower) << 4, fourth = (b >> 4 & lower) | (d & upper);
    const Quad low01 = __builtin_shufflevector(first, second, 0, 4, 1, 5);
    const Quad low23 = __builtin_shufflevector(first, second, 2, 6, 3, 7);
    const Quad high01 = __builtin_shufflevector(third, fourth, 0, 4, 1, 5);
    const Quad high23 = __builtin_shufflevector(third, fourth, 2, 6, 3, 7);
    source += kCodes;
    return (__builtin_shufflevector(low01, high01, 0, 1, 4, 5) ^ load_quad(source)) |
           (__builtin_shufflevector(low01, high01, 2, 3, 6, 7) ^ load_quad(source + stride)) |
           (__builtin_shufflevector(low23, high23, 0, 1, 4, 5) ^ load_quad(source + 2 * stride)) |
           (__builtin_shufflevector(low23, high23, 2, 3, 6, 7) ^ load_quad(source + 3 * stride));
  }

  // Bit u of byte c -> bit 4u + c. The product moves the lowest bits of four bytes side by side, to bits 24..27.
  static std::uint32_t gather(std::uint32_t line) {
    std::uint32_t bits = 0;
    for (unsigned u = 0; u < 8; ++u) bits |= (((line >> u & 0x01010101) * 0x01020408) >> 24 & 15) << 4 * u;
    return bits;
  }
};

struct Q8_0 {
  static constexpr Type kType = Type::kQ8_0;

  template <class Sink>
  static void read(const std::uint8_t* tile, std::size_t group, std::size_t lane, Sink& sink) {
    sink(0, load16(tile + 32 * group + 2 * lane));
    for (std::size_t i = 0; i < 4; ++i) {
      const std::uint8_t* line = tile + kLine * (1 + 8 * group + 2 * i) + 4 * lane;
      const std::uint64_t codes = load32(line) | static_cast<std::uint64_t>(load32(line + kLine)) << 32;
      sink(2 + 8 * i, codes ^ 0x8080808080808080);
    }
  }
};

template <Type type, bool fifth>
struct Scaled256 {
  static constexpr Type kType = type;

  template <class Sink>
  static void read(const std::uint8_t* tile, std::size_t, std::size_t lane, Sink& sink) {
    sink(0, load16(tile + 2 * lane));
    sink(2, load16(tile + 32 + 2 * lane));
    const std::uint8_t* scales = tile + kLine + lane;
    const std::uint32_t low = column(scales), high = column(scales + 2 * kLine);
    sink(4, (low & 0x0f0f0f0f) | (high & 0x03030303) << 4 | (high & 0x30303030) << 2);
    sink(8, (low >> 4 & 0x0f0f0f0f) | (high & 0x0c0c0c0c) << 2 | (high & 0xc0c0c0c0));
    sink(12, column(scales + kLine));
    const std::uint8_t* line = tile + 256 + 4 * lane;
    for (std::size_t i = 0; i < 16; ++i) {
      const std::uint8_t* pair = line + kLine * (8 * (i / 4) + i % 4);
      sink((fifth ? 48 : 16) + 8 * i, nibbles(pair, pair + 4 * kLine));
    }
    if constexpr (fifth) read_fifth(tile + 2304 + 4 * lane, sink);
  }

  // Bit u of byte c of line g -> bit g of byte 4u + c; two u at a time.
  template <class Sink>
  static void read_fifth(const std::uint8_t* line, Sink& sink) {
    std::uint64_t bytes[4] = {};
    for (unsigned g = 0; g < 8; ++g) {
      const std::uint64_t bits = load32(line + kLine * g), both = bits | bits >> 1 << 32;
      for (unsigned i = 0; i < 4; ++i) bytes[i] |= (both >> 2 * i & 0x0101010101010101) << g;
    }
    for (std::size_t i = 0; i < 4; ++i) sink(16 + 8 * i, bytes[i]);
  }
};

struct Q6_K {
  static constexpr Type kType = Type::kQ6_K;

  template <class Sink>
  static void read(const std::uint8_t* tile, std::size_t, std::size_t lane, Sink& sink) {
    sink(208, load16(tile + 2 * lane));
    sink.lost(load16(tile + 32 + 2 * lane));
    for (std::size_t i = 0; i < 4; ++i) sink(192 + 4 * i, column(tile + kLine * (1 + i) + lane));
    const std::uint8_t* line = tile + 320 + 4 * lane;
    for (std::size_t i = 0; i < 16; ++i) {
      const std::uint8_t* pair = line + kLine * (16 * (i / 8) + i % 8);
      sink(8 * i, nibbles(pair, pair + 8 * kLine));
    }
    for (std::size_t part = 0; part < 4; ++part) {
      read_high(tile + 2368 + kLine * (8 * (part / 2) + part % 2) + 4 * lane, 128 + 16 * part, sink);
    }
  }

  // Bits 2v of byte c of the f-th of every second line -> bits 2f of byte 4v + c; two v at a time.
  template <class Sink>
  static void read_high(const std::uint8_t* line, std::size_t at, Sink& sink) {
    std::uint64_t bytes[2] = {};
    for (unsigned f = 0; f < 4; ++f) {
      const std::uint64_t bits = load32(line + 2 * kLine * f), both = bits | bits >> 2 << 32;
      for (unsigned i = 0; i < 2; ++i) bytes[i] |= (both >> 4 * i & 0x0303030303030303) << 2 * f;
    }
    for (std::size_t i = 0; i < 2; ++i) sink(at + 8 * i, bytes[i]);
  }
};

struct IQ4_XS {
  static constexpr Type kType = Type::kIQ4_XS;

  template <class Sink>
  static void read(const std::uint8_t* tile, std::size_t, std::size_t lane, Sink& sink) {
    sink(0, load16(tile + 2 * lane));
    const std::uint8_t* scales = tile + lane;
    sink(2, static_cast<std::uint16_t>(apart(scales[32]) | apart(scales[48]) << 2));
    const std::uint32_t low = column(scales + 64);
    const std::uint32_t first = (low & 0x000f000f) | (low >> 4 & 0x00f000f0);
    const std::uint32_t second = (low >> 4 & 0x000f000f) | (low >> 8 & 0x00f000f0);
    sink(4, static_cast<std::uint16_t>(first | first >> 8));
    sink(6, static_cast<std::uint16_t>(second | second >> 8));
    const std::uint8_t* line = tile + 2 * kLine + 4 * lane;
    for (std::size_t i = 0; i < 16; ++i) {
      const std::uint8_t* pair = line + kLine * (4 * (i / 2) + i % 2);
      sink(8 + 8 * i, nibbles(pair, pair + 2 * kLine));
    }
  }

  // Bits 2i and 2i + 1 -> bits 4i and 4i + 1.
  static unsigned apart(unsigned bits) {
    bits = (bits | bits << 4) & 0x0f0f;
    return (bits | bits << 2) & 0x3333;
  }
};

struct MXFP4 {
  static constexpr Type kType = Type::kMXFP4;

  template <class Sink>
  static void read(const std::uint8_t* tile, std::size_t group, std::size_t lane, Sink& sink) {
    sink(0, tile[16 * group + lane]);
    const std::uint8_t* line = tile + 32 + kLine * 4 * group + 4 * lane;
    for (std::size_t i = 0; i < 2; ++i) sink(1 + 8 * i, nibbles(line + kLine * i, line + kLine * (2 + i)));
  }
};

template <Type type>
struct Raw {
  static constexpr Type kType = type;

  template <class Sink>
  static void read(const std::uint8_t* tile, std::size_t, std::size_t lane, Sink& sink) {
    constexpr std::size_t kBytes = layout_of(type).group_bytes;
    for (std::size_t i = 0; i < kBytes; i += 2) sink(i, load16(tile + lane * kBytes + i));
  }
};

template <Type type>
struct Plain {
  static constexpr Type kType = type;

  template <class Sink>
  static void read(const std::uint8_t* tile, std::size_t, std::size_t lane, Sink& sink) {
    for (std::size_t i = 0; i < 16; ++i) sink(4 * i, load32(tile + kLine * i + 4 * lane));
  }
};

// An element of a vector, binary32 -> the source's form.
template <Type type>
struct Vector {
  static constexpr Type kType = type;

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

  template <class Sink>
  static void read(const std::uint8_t* tile, std::size_t, std::size_t lane, Sink& sink) {
    const std::uint32_t bits = load32(tile + 4 * lane);
    std::uint32_t lost = 0;
    if constexpr (type == Type::kVectorF16) sink(0, static_cast<std::uint16_t>(narrow_f16(bits, lost)));
    if constexpr (type == Type::kVectorBF16) lost = bits & 0xffff, sink(0, static_cast<std::uint16_t>(bits >> 16));
    if constexpr (type == Type::kVectorF32) sink(0, bits);
    sink.lost(lost);
  }
};

template <class Format>
bool holds_fours(const std::uint8_t* source, std::size_t stride, const std::uint8_t* packed) {
  constexpr Layout k = layout_of(Format::kType);
  Quad codes = {};
  std::uint64_t bits = 0;
  for (std::size_t group = 0; group < k.groups; ++group, source += k.group_bytes) {
    for (std::size_t lane = 0; lane < kLanes; lane += 4) {
      const std::uint8_t* rows = source + lane * stride;
      codes |= Format::differ(packed, group, lane, rows, stride);
#pragma GCC unroll 4
      for (std::size_t row = 0; row < 4; ++row) {
        Compare compare{rows + row * stride};
        Format::read_head(packed, group, lane + row, compare);
        bits |= compare.bits;
      }
    }
  }
  return (bits | codes[0] | codes[1] | codes[2] | codes[3]) == 0;
}

template <class Format>
bool holds_whole(const Rows& rows, std::size_t tile, const std::uint8_t* packed) {
  constexpr Layout k = layout_of(Format::kType);
  const std::uint8_t* source = rows.data + tile * k.groups * k.group_bytes;
  if constexpr (requires { Format::differ; }) return holds_fours<Format>(source, rows.bytes, packed);
  std::uint64_t bits = 0;
  for (std::size_t lane = 0; lane < kLanes; ++lane, source += rows.bytes) {
    for (std::size_t group = 0; group < k.groups; ++group) {
      Compare compare{source + group * k.group_bytes};
      Format::read(packed, group, lane, compare);
      bits |= compare.bits;
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
      absent_group(Format::kType, expected);
      if (lane < rows.count && start < rows.bytes) {
        std::memcpy(expected, rows.data + lane * rows.bytes + start, std::min(k.group_bytes, rows.bytes - start));
      }
      Compare compare{expected};
      Format::read(packed, group, lane, compare);
      if (compare.bits != 0) return false;
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
      Take take{taken};
      Format::read(packed + index / k.groups * k.tile_bytes, index % k.groups, lane, take);
      std::memcpy(out + lane * bytes + start, taken, std::min(k.group_bytes, bytes - start));
    }
  }
}

}  // namespace

void unpack_rows(Type type, const std::uint8_t* packed, std::size_t bytes, std::size_t count, std::uint8_t* out) {
  switch (type) {
    case Type::kQ4_0: return unpack_all<Group32<Type::kQ4_0, false, false>>(packed, bytes, count, out);
    case Type::kQ4_1: return unpack_all<Group32<Type::kQ4_1, true, false>>(packed, bytes, count, out);
    case Type::kQ5_0: return unpack_all<Group32<Type::kQ5_0, false, true>>(packed, bytes, count, out);
    case Type::kQ5_1: return unpack_all<Group32<Type::kQ5_1, true, true>>(packed, bytes, count, out);
    case Type::kQ8_0: return unpack_all<Q8_0>(packed, bytes, count, out);
    case Type::kQ4_K: return unpack_all<Scaled256<Type::kQ4_K, false>>(packed, bytes, count, out);
    case Type::kQ5_K: return unpack_all<Scaled256<Type::kQ5_K, true>>(packed, bytes, count, out);
    case Type::kQ6_K: return unpack_all<Q6_K>(packed, bytes, count, out);
    case Type::kIQ4_NL: return unpack_all<Group32<Type::kIQ4_NL, false, false>>(packed, bytes, count, out);
    case Type::kIQ4_XS: return unpack_all<IQ4_XS>(packed, bytes, count, out);
    case Type::kMXFP4: return unpack_all<MXFP4>(packed, bytes, count, out);
    case Type::kQ2_K: return unpack_all<Raw<Type::kQ2_K>>(packed, bytes, count, out);
    case Type::kQ3_K: return unpack_all<Raw<Type::kQ3_K>>(packed, bytes, count, out);
    case Type::kIQ1_S: return unpack_all<Raw<Type::kIQ1_S>>(packed, bytes, count, out);
    case Type::kIQ1_M: return unpack_all<Raw<Type::kIQ1_M>>(packed, bytes, count, out);
    case Type::kIQ2_XXS: return unpack_all<Raw<Type::kIQ2_XXS>>(packed, bytes, count, out);
    case Type::kIQ2_XS: return unpack_all<Raw<Type::kIQ2_XS>>(packed, bytes, count, out);
    case Type::kIQ2_S: return unpack_all<Raw<Type::kIQ2_S>>(packed, bytes, count, out);
    case Type::kIQ3_XXS: return unpack_all<Raw<Type::kIQ3_XXS>>(packed, bytes, count, out);
    case Type::kIQ3_S: return unpack_all<Raw<Type::kIQ3_S>>(packed, bytes, count, out);
    case Type::kTQ1_0: return unpack_all<Raw<Type::kTQ1_0>>(packed, bytes, count, out);
    case Type::kTQ2_0: return unpack_all<Raw<Type::kTQ2_0>>(packed, bytes, count, out);
    case Type::kF16: return unpack_all<Plain<Type::kF16>>(packed, bytes, count, out);
    case Type::kF32: return unpack_all<Plain<Type::kF32>>(packed, bytes, count, out);
    case Type::kVectorF16: return unpack_all<Vector<Type::kVectorF16>>(packed, bytes, count, out);
    case Type::kVectorBF16: return unpack_all<Vector<Type::kVectorBF16>>(packed, bytes, count, out);
    case Type::kVectorF32: return unpack_all<Vector<Type::kVectorF32>>(packed, bytes, count, out);
  }
}

bool holds(Type type, const Rows& rows, std::size_t first, std::size_t last, const std::uint8_t* packed) {
  switch (type) {
    case Type::kQ4_0: return holds_all<Group32<Type::kQ4_0, false, false>>(rows, first, last, packed);
    case Type::kQ4_1: return holds_all<Group32<Type::kQ4_1, true, false>>(rows, first, last, packed);
    case Type::kQ5_0: return holds_all<Group32<Type::kQ5_0, false, true>>(rows, first, last, packed);
    case Type::kQ5_1: return holds_all<Group32<Type::kQ5_1, true, true>>(rows, first, last, packed);
    case Type::kQ8_0: return holds_all<Q8_0>(rows, first, last, packed);
    case Type::kQ4_K: return holds_all<Scaled256<Type::kQ4_K, false>>(rows, first, last, packed);
    case Type::kQ5_K: return holds_all<Scaled256<Type::kQ5_K, true>>(rows, first, last, packed);
    case Type::kQ6_K: return holds_all<Q6_K>(rows, first, last, packed);
    case Type::kIQ4_NL: return holds_all<Group32<Type::kIQ4_NL, false, false>>(rows, first, last, packed);
    case Type::kIQ4_XS: return holds_all<IQ4_XS>(rows, first, last, packed);
    case Type::kMXFP4: return holds_all<MXFP4>(rows, first, last, packed);
    case Type::kQ2_K: return holds_all<Raw<Type::kQ2_K>>(rows, first, last, packed);
    case Type::kQ3_K: return holds_all<Raw<Type::kQ3_K>>(rows, first, last, packed);
    case Type::kIQ1_S: return holds_all<Raw<Type::kIQ1_S>>(rows, first, last, packed);
    case Type::kIQ1_M: return holds_all<Raw<Type::kIQ1_M>>(rows, first, last, packed);
    case Type::kIQ2_XXS: return holds_all<Raw<Type::kIQ2_XXS>>(rows, first, last, packed);
    case Type::kIQ2_XS: return holds_all<Raw<Type::kIQ2_XS>>(rows, first, last, packed);
    case Type::kIQ2_S: return holds_all<Raw<Type::kIQ2_S>>(rows, first, last, packed);
    case Type::kIQ3_XXS: return holds_all<Raw<Type::kIQ3_XXS>>(rows, first, last, packed);
    case Type::kIQ3_S: return holds_all<Raw<Type::kIQ3_S>>(rows, first, last, packed);
    case Type::kTQ1_0: return holds_all<Raw<Type::kTQ1_0>>(rows, first, last, packed);
    case Type::kTQ2_0: return holds_all<Raw<Type::kTQ2_0>>(rows, first, last, packed);
    case Type::kF16: return holds_all<Plain<Type::kF16>>(rows, first, last, packed);
    case Type::kF32: return holds_all<Plain<Type::kF32>>(rows, first, last, packed);
    case Type::kVectorF16: return holds_all<Vector<Type::kVectorF16>>(rows, first, last, packed);
    case Type::kVectorBF16: return holds_all<Vector<Type::kVectorBF16>>(rows, first, last, packed);
    case Type::kVectorF32: return holds_all<Vector<Type::kVectorF32>>(rows, first, last, packed);
  }
  return false;
}

}  // namespace vai::burn
