// The ROM's tiles beside the checkpoint's rows: sizes, and the two directions between them.
//
// A tile is 16 rows x `columns` columns in `tile_bytes` bytes; a row of it comes from `groups` groups of `group_bytes`
// source bytes each (a quantization block, or for float types 64 bytes of plain values). docs/rom-format.md has the
// layouts. Packing (pack.cc) and unpacking (unpack.cc) are separate translation units written separately, so that the
// proof reads what is really in memory.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace vai::burn {

constexpr std::size_t kLanes = 16;
constexpr std::size_t kLine = 64;

// From kQ2_K on the checkpoint's blocks stay what they are. BF16 matrices are laid out as F16 ones: both are 2-byte values. A vector is a matrix of one column, widened to
// binary32, so that its tile is 16 elements.
enum class Type {
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ8_0,
  kQ4_K,
  kQ5_K,
  kQ6_K,
  kIQ4_NL,
  kIQ4_XS,
  kMXFP4,
  kQ2_K,
  kQ3_K,
  kIQ1_S,
  kIQ1_M,
  kIQ2_XXS,
  kIQ2_XS,
  kIQ2_S,
  kIQ3_XXS,
  kIQ3_S,
  kTQ1_0,
  kTQ2_0,
  kF16,
  kF32,
  kVectorF16,
  kVectorBF16,
  kVectorF32
};

constexpr bool is_quantized(Type type) { return type < Type::kF16; }

struct Layout {
  std::size_t columns, tile_bytes, groups, group_columns, group_bytes;
};

constexpr std::size_t kLargestTile = 3392;

constexpr Layout layout_of(Type type) {
  switch (type) {
    case Type::kQ4_0: return {64, 576, 2, 32, 18};
    case Type::kQ4_1: return {64, 640, 2, 32, 20};
    case Type::kQ5_0: return {64, 704, 2, 32, 22};
    case Type::kQ5_1: return {64, 768, 2, 32, 24};
    case Type::kQ8_0: return {64, 1088, 2, 32, 34};
    case Type::kQ4_K: return {256, 2304, 1, 256, 144};
    case Type::kQ5_K: return {256, 2816, 1, 256, 176};
    case Type::kQ6_K: return {256, kLargestTile, 1, 256, 210};
    case Type::kIQ4_NL: return {64, 576, 2, 32, 18};
    case Type::kIQ4_XS: return {256, 2176, 1, 256, 136};
    case Type::kMXFP4: return {64, 544, 2, 32, 17};
    case Type::kQ2_K: return {256, 16 * 84, 1, 256, 84};
    case Type::kQ3_K: return {256, 16 * 110, 1, 256, 110};
    case Type::kIQ1_S: return {256, 16 * 50, 1, 256, 50};
    case Type::kIQ1_M: return {256, 16 * 56, 1, 256, 56};
    case Type::kIQ2_XXS: return {256, 16 * 66, 1, 256, 66};
    case Type::kIQ2_XS: return {256, 16 * 74, 1, 256, 74};
    case Type::kIQ2_S: return {256, 16 * 82, 1, 256, 82};
    case Type::kIQ3_XXS: return {256, 16 * 98, 1, 256, 98};
    case Type::kIQ3_S: return {256, 16 * 110, 1, 256, 110};
    case Type::kTQ1_0: return {256, 16 * 54, 1, 256, 54};
    case Type::kTQ2_0: return {256, 16 * 66, 1, 256, 66};
    case Type::kF16: return {32, 1024, 1, 32, 64};
    case Type::kF32: return {16, 1024, 1, 16, 64};
    case Type::kVectorF16:
    case Type::kVectorBF16: return {1, 64, 1, 1, 2};
    case Type::kVectorF32: return {1, 64, 1, 1, 4};
  }
  return {};
}

// Bytes of one source row of `columns` columns, which are whole groups for the quantized types.
constexpr std::size_t row_bytes(Type type, std::size_t columns) {
  const Layout k = layout_of(type);
  return is_quantized(type) ? columns / k.group_columns * k.group_bytes : columns * (k.group_bytes / k.group_columns);
}

// The source group of a lane or a tail that does not exist, which is stored as zeros: zeros too, but for Q8_0's codes.
inline void absent_group(Type type, std::uint8_t* out) {
  const std::size_t bytes = layout_of(type).group_bytes;
  std::memset(out, 0, bytes);
  if (type == Type::kQ8_0) std::memset(out + 2, 0x80, bytes - 2);
}

// Up to 16 rows of a source matrix: row n begins at data + n * bytes and has `bytes` bytes. Lanes from `count` on do
// not exist in the source and are stored as zeros.
struct Rows {
  const std::uint8_t* data;
  std::size_t bytes, count;
};

// Tiles [first, last) of these rows -> `target`, which is where tile `first` goes.
void pack_tiles(Type type, const Rows& rows, std::size_t first, std::size_t last, std::uint8_t* target);

// Whether `packed`, where tile `first` lies, holds exactly these rows: every code and every scale bit of every lane
// equals the source's, and everything beyond the source is zero. Equal codes and scales dequantize to equal bits.
bool holds(Type type, const Rows& rows, std::size_t first, std::size_t last, const std::uint8_t* packed);

// The rows again, from all tiles of 16 stored rows.
void unpack_rows(Type type, const std::uint8_t* packed, std::size_t bytes, std::size_t count, std::uint8_t* out);

}  // namespace vai::burn
