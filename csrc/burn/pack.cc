// Checkpoint rows -> ROM tiles: a permutation of bits, nothing is rounded.
#include <algorithm>
#include <cstring>

#include "tiles.h"

namespace vai::burn {
namespace {

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

// Byte b of each of four rows, side by side at to + 16 b.
void store_bytes(std::uint8_t* to, Quad value) {
  using Bytes = std::uint8_t __attribute__((vector_size(16)));
  Bytes rows;
  std::memcpy(&rows, &value, sizeof rows);
  const Bytes columns = __builtin_shufflevector(rows, rows, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  Quad four;
  std::memcpy(&four, &columns, sizeof four);
  for (std::size_t b = 0; b < 4; ++b) {
    const std::uint32_t dword = four[b];
    std::memcpy(to + 16 * b, &dword, sizeof dword);
  }
}

// Two bytes of each of four rows, side by side: binary16 scales.
void put_halves(const std::uint8_t* source, std::size_t stride, std::uint8_t* to) {
  for (std::size_t row = 0; row < 4; ++row) std::memcpy(to + 2 * row, source + row * stride, 2);
}

// 16 source bytes of each row: the codes in their low nibbles become two lines from `low` on, those in the high nibbles
// two from `high` on. A line holds 8 elements of every row, byte b of a dword having element b low, element 4 + b high.
void put_nibbles(const Quads& codes, std::uint8_t* low, std::uint8_t* high) {
  const Quad lower = Quad{} + 0x0f0f0f0f, upper = Quad{} + 0xf0f0f0f0;
  for (std::size_t half = 0; half < 2; ++half) {
    const Quad a = codes.at[2 * half], b = codes.at[2 * half + 1];
    store_quad(low + kLine * half, (a & lower) | ((b & lower) << 4));
    store_quad(high + kLine * half, ((a >> 4) & lower) | (b & upper));
  }
}

// One step of transposing a matrix of bits: what `a` has `shift` bits above `mask` for what `b` has in it.
void exchange(Quad& a, Quad& b, unsigned shift, std::uint32_t mask) {
  const Quad moved = ((a >> shift) ^ b) & mask;
  b ^= moved;
  a ^= moved << shift;
}

// Each format says where one group of four rows goes: `group` within the tile, `lane` the first of the four. Every byte
// of the tile is written. A line is 64 bytes.

// Groups of 32 in 4 or 5 bits, with or without a minimum. Source: fp16 scale, fp16 minimum, 32 fifth bits, 16 bytes
// whose low nibbles are elements 0..15 and high nibbles 16..31.
template <Type type, bool minimum, bool fifth>
struct Group32 {
  static constexpr Type kType = type;

  static void put_four(const std::uint8_t* source, std::size_t stride, std::size_t group, std::size_t lane,
                       std::uint8_t* tile) {
    constexpr std::size_t kBits = minimum ? 4 : 2, kCodes = kBits + (fifth ? 4 : 0), kLines = minimum ? 2 : 1;
    put_halves(source, stride, tile + 32 * group + 2 * lane);
    if constexpr (minimum) put_halves(source + 2, stride, tile + kLine + 32 * group + 2 * lane);
    std::uint8_t* line = tile + kLine * (kLines + 4 * group) + 4 * lane;
    put_nibbles(load_columns(source + kCodes, stride), line, line + 2 * kLine);
    if constexpr (fifth) {
      std::uint32_t bits[4];
      for (std::size_t row = 0; row < 4; ++row) std::memcpy(bits + row, source + kBits + row * stride, sizeof *bits);
      store_quad(tile + kLine * (kLines + 8 + group) + 4 * lane, spread(Quad{bits[0], bits[1], bits[2], bits[3]}));
    }
  }

  // Bit 4u + c, that of element 4u + c, becomes bit u of byte c.
  static Quad spread(Quad bits) {
    Quad out = {};
    for (unsigned c = 0; c < 4; ++c) {
      Quad each = (bits >> c) & 0x11111111;
      each = (each | each >> 3) & 0x03030303;
      each = (each | each >> 6) & 0x000f000f;
      out |= ((each | each >> 12) & 0xff) << 8 * c;
    }
    return out;
  }
};

struct Q8_0 {
  static constexpr Type kType = Type::kQ8_0;

  static void put_four(const std::uint8_t* source, std::size_t stride, std::size_t group, std::size_t lane,
                       std::uint8_t* tile) {
    put_halves(source, stride, tile + 32 * group + 2 * lane);
    std::uint8_t* line = tile + kLine * (1 + 8 * group) + 4 * lane;
    for (std::size_t half = 0; half < 2; ++half) {
      const Quads codes = load_columns(source + 2 + 16 * half, stride);
      for (std::size_t i = 0; i < 4; ++i) store_quad(line + kLine * (4 * half + i), codes.at[i] ^ 0x80808080);
    }
  }
};

// Q4_K and Q5_K. Source: fp16 scale of the scales and of the minimums; 12 bytes of 6-bit scales and minimums of 8
// groups; Q5_K's fifth bits, bit g of byte l being that of element 32g + l; 4 x 32 bytes of codes, the low nibbles of
// the j-th being elements 64j..64j+31, the high ones the 32 after them.
template <Type type, bool fifth>
struct Scaled256 {
  static constexpr Type kType = type;

  static void put_four(const std::uint8_t* source, std::size_t stride, std::size_t, std::size_t lane,
                       std::uint8_t* tile) {
    put_halves(source, stride, tile + 2 * lane);
    put_halves(source + 2, stride, tile + 32 + 2 * lane);
    put_scales(load_columns(source, stride), tile + kLine + lane);
    const std::uint8_t* codes = source + (fifth ? 48 : 16);
    for (std::size_t part = 0; part < 8; ++part) {
      std::uint8_t* line = tile + kLine * (4 + 8 * (part / 2) + 2 * (part % 2)) + 4 * lane;
      put_nibbles(load_columns(codes + 16 * part, stride), line, line + 4 * kLine);
    }
    if constexpr (fifth) put_fifth(source + 16, stride, tile + 2304 + 4 * lane);
  }

  // In the source, the 6 low bits of bytes 0..3 are scales 0..3, of bytes 4..7 minimums 0..3; bytes 8..11 are the 4 low
  // bits of scales and minimums 4..7, whose 2 high bits lie above those of the first.
  static void put_scales(const Quads& head, std::uint8_t* to) {
    const Quad sc = head.at[1], m = head.at[2];
    store_bytes(to, (sc & 0x0f0f0f0f) | ((m & 0x0f0f0f0f) << 4));
    store_bytes(to + kLine, head.at[3]);
    store_bytes(to + 2 * kLine, ((sc >> 4) & 0x03030303) | ((m >> 2) & 0x0c0c0c0c) | ((sc >> 2) & 0x30303030) |
                                    (m & 0xc0c0c0c0));
  }

  // Bit g of byte c of source dword u, that of element 32g + 4u + c, becomes bit u of byte c of line g: 8 x 8 transposed.
  static void put_fifth(const std::uint8_t* source, std::size_t stride, std::uint8_t* line) {
    const Quads first = load_columns(source, stride), second = load_columns(source + 16, stride);
    Quad bits[8];
    for (std::size_t i = 0; i < 4; ++i) bits[i] = first.at[i], bits[4 + i] = second.at[i];
    for (std::size_t i : {0, 1, 2, 3}) exchange(bits[i], bits[i + 4], 4, 0x0f0f0f0f);
    for (std::size_t i : {0, 1, 4, 5}) exchange(bits[i], bits[i + 2], 2, 0x33333333);
    for (std::size_t i : {0, 2, 4, 6}) exchange(bits[i], bits[i + 1], 1, 0x55555555);
    for (std::size_t g = 0; g < 8; ++g) store_quad(line + kLine * g, bits[g]);
  }
};

// Source: 2 x 64 bytes of low 4 bits, a half of 128 elements each (0..63 in the low nibbles, 64..127 in the high ones);
// 2 x 32 bytes of high 2 bits (bits 2f of byte l: element 32f + l of the half); 16 int8 scales; fp16 scale of those.
struct Q6_K {
  static constexpr Type kType = Type::kQ6_K;

  static void put_four(const std::uint8_t* source, std::size_t stride, std::size_t, std::size_t lane,
                       std::uint8_t* tile) {
    put_halves(source + 208, stride, tile + 2 * lane);
    std::memset(tile + 32 + 2 * lane, 0, 8);
    const Quads scales = load_columns(source + 192, stride);
    for (std::size_t i = 0; i < 4; ++i) store_bytes(tile + kLine * (1 + i) + lane, scales.at[i]);
    for (std::size_t part = 0; part < 8; ++part) {
      std::uint8_t* line = tile + kLine * (5 + 16 * (part / 4) + 2 * (part % 4)) + 4 * lane;
      put_nibbles(load_columns(source + 16 * part, stride), line, line + 8 * kLine);
    }
    for (std::size_t part = 0; part < 4; ++part) {
      std::uint8_t* line = tile + kLine * (37 + 8 * (part / 2) + part % 2) + 4 * lane;
      put_high(load_columns(source + 128 + 16 * part, stride), line);
    }
  }

  // Bits 2f of byte c of dword v become bits 2v of byte c of the f-th of every second line: 4 x 4 pairs transposed.
  static void put_high(Quads bits, std::uint8_t* line) {
    exchange(bits.at[0], bits.at[2], 4, 0x0f0f0f0f);
    exchange(bits.at[1], bits.at[3], 4, 0x0f0f0f0f);
    exchange(bits.at[0], bits.at[1], 2, 0x33333333);
    exchange(bits.at[2], bits.at[3], 2, 0x33333333);
    for (std::size_t f = 0; f < 4; ++f) store_quad(line + 2 * kLine * f, bits.at[f]);
  }
};

// Source: fp16 scale of the scales; their high two bits, 16 of them, group g's from bit 2g on; 4 bytes of their low four,
// two groups each; 16 bytes of codes for each group of 32, elements 0..15 in the low nibbles, 16..31 in the high ones.
struct IQ4_XS {
  static constexpr Type kType = Type::kIQ4_XS;

  static void put_four(const std::uint8_t* source, std::size_t stride, std::size_t, std::size_t lane,
                       std::uint8_t* tile) {
    put_halves(source, stride, tile + 2 * lane);
    for (std::size_t row = 0; row < 4; ++row) put_scales(source + 2 + row * stride, tile + lane + row);
    for (std::size_t g = 0; g < 8; ++g) {
      std::uint8_t* line = tile + kLine * (2 + 4 * g) + 4 * lane;
      put_nibbles(load_columns(source + 8 + 16 * g, stride), line, line + 2 * kLine);
    }
  }

  // `from`: two bytes of high bits, four of low ones.
  static void put_scales(const std::uint8_t* from, std::uint8_t* to) {
    const unsigned high = from[0] | from[1] << 8;
    unsigned even = 0, odd = 0;
    for (unsigned pair = 0; pair < 4; ++pair) {
      even |= (high >> 4 * pair & 3) << 2 * pair;
      odd |= (high >> (4 * pair + 2) & 3) << 2 * pair;
    }
    to[32] = static_cast<std::uint8_t>(even);
    to[48] = static_cast<std::uint8_t>(odd);
    for (std::size_t g = 0; g < 4; ++g) {
      const unsigned first = from[2 + g / 2] >> 4 * (g % 2) & 15, second = from[4 + g / 2] >> 4 * (g % 2) & 15;
      to[64 + 16 * g] = static_cast<std::uint8_t>(first | second << 4);
    }
  }
};

// Source: the scale, a byte; codes as in Q4_0.
struct MXFP4 {
  static constexpr Type kType = Type::kMXFP4;

  static void put_four(const std::uint8_t* source, std::size_t stride, std::size_t group, std::size_t lane,
                       std::uint8_t* tile) {
    for (std::size_t row = 0; row < 4; ++row) tile[16 * group + lane + row] = source[row * stride];
    std::uint8_t* line = tile + 32 + kLine * 4 * group + 4 * lane;
    put_nibbles(load_columns(source + 1, stride), line, line + 2 * kLine);
  }
};

// The source's own blocks, one after the other.
template <Type type>
struct Raw {
  static constexpr Type kType = type;

  static void put_four(const std::uint8_t* source, std::size_t stride, std::size_t, std::size_t lane,
                       std::uint8_t* tile) {
    constexpr std::size_t kBytes = layout_of(type).group_bytes;
    for (std::size_t row = 0; row < 4; ++row) std::memcpy(tile + (lane + row) * kBytes, source + row * stride, kBytes);
  }
};

template <Type type>
struct Plain {
  static constexpr Type kType = type;

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

  static void put_four(const std::uint8_t* source, std::size_t stride, std::size_t, std::size_t lane,
                       std::uint8_t* tile) {
    for (std::size_t row = 0; row < 4; ++row) {
      std::uint32_t bits = 0;
      std::memcpy(&bits, source + row * stride, layout_of(type).group_bytes);
      if constexpr (type == Type::kVectorF16) bits = widen_f16(bits);
      if constexpr (type == Type::kVectorBF16) bits <<= 16;
      std::memcpy(tile + 4 * (lane + row), &bits, sizeof bits);
    }
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
  constexpr std::size_t kBytes = k.groups * k.group_bytes;
  std::uint8_t whole[kLanes * kBytes];
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    for (std::size_t group = 0; group < k.groups; ++group) {
      const std::size_t start = (tile * k.groups + group) * k.group_bytes;
      std::uint8_t* copy = whole + lane * kBytes + group * k.group_bytes;
      absent_group(Format::kType, copy);
      if (lane >= rows.count || start >= rows.bytes) continue;
      std::memcpy(copy, rows.data + lane * rows.bytes + start, std::min(k.group_bytes, rows.bytes - start));
    }
  }
  pack_whole<Format>({whole, kBytes, kLanes}, 0, target);
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
    case Type::kQ4_0: return pack_all<Group32<Type::kQ4_0, false, false>>(rows, first, last, target);
    case Type::kQ4_1: return pack_all<Group32<Type::kQ4_1, true, false>>(rows, first, last, target);
    case Type::kQ5_0: return pack_all<Group32<Type::kQ5_0, false, true>>(rows, first, last, target);
    case Type::kQ5_1: return pack_all<Group32<Type::kQ5_1, true, true>>(rows, first, last, target);
    case Type::kQ8_0: return pack_all<Q8_0>(rows, first, last, target);
    case Type::kQ4_K: return pack_all<Scaled256<Type::kQ4_K, false>>(rows, first, last, target);
    case Type::kQ5_K: return pack_all<Scaled256<Type::kQ5_K, true>>(rows, first, last, target);
    case Type::kQ6_K: return pack_all<Q6_K>(rows, first, last, target);
    case Type::kIQ4_NL: return pack_all<Group32<Type::kIQ4_NL, false, false>>(rows, first, last, target);
    case Type::kIQ4_XS: return pack_all<IQ4_XS>(rows, first, last, target);
    case Type::kMXFP4: return pack_all<MXFP4>(rows, first, last, target);
    case Type::kQ2_K: return pack_all<Raw<Type::kQ2_K>>(rows, first, last, target);
    case Type::kQ3_K: return pack_all<Raw<Type::kQ3_K>>(rows, first, last, target);
    case Type::kIQ1_S: return pack_all<Raw<Type::kIQ1_S>>(rows, first, last, target);
    case Type::kIQ1_M: return pack_all<Raw<Type::kIQ1_M>>(rows, first, last, target);
    case Type::kIQ2_XXS: return pack_all<Raw<Type::kIQ2_XXS>>(rows, first, last, target);
    case Type::kIQ2_XS: return pack_all<Raw<Type::kIQ2_XS>>(rows, first, last, target);
    case Type::kIQ2_S: return pack_all<Raw<Type::kIQ2_S>>(rows, first, last, target);
    case Type::kIQ3_XXS: return pack_all<Raw<Type::kIQ3_XXS>>(rows, first, last, target);
    case Type::kIQ3_S: return pack_all<Raw<Type::kIQ3_S>>(rows, first, last, target);
    case Type::kTQ1_0: return pack_all<Raw<Type::kTQ1_0>>(rows, first, last, target);
    case Type::kTQ2_0: return pack_all<Raw<Type::kTQ2_0>>(rows, first, last, target);
    case Type::kF16: return pack_all<Plain<Type::kF16>>(rows, first, last, target);
    case Type::kF32: return pack_all<Plain<Type::kF32>>(rows, first, last, target);
    case Type::kVectorF16: return pack_all<Vector<Type::kVectorF16>>(rows, first, last, target);
    case Type::kVectorBF16: return pack_all<Vector<Type::kVectorBF16>>(rows, first, last, target);
    case Type::kVectorF32: return pack_all<Vector<Type::kVectorF32>>(rows, first, last, target);
  }
}

}  // namespace vai::burn
