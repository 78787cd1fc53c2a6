// Codes of the ROM's lines, and their integer scales, as the multiplying loops want them.
#pragma once

#include "vai/ops.h"

namespace vai {
namespace {

constexpr int kScratchWidth = 32;  // outputs of two blocks, in a row of the sums

// The codes of nibble line i of a group: its own four bits, and above them those that line `above` has for it. Once the
// loop over i is unrolled one case is left.
template <class V, int kBits>
inline __attribute__((always_inline)) typename V::Nibbles codes_of(const uint8_t* line, const typename V::I& above, int i) {
  const typename V::Nibbles w = V::nibbles(line);
  if constexpr (kBits == 5) {
    if (i == 0) return V::template join<4, 3, 0x10>(w, above);
    if (i == 1) return V::template join<2, 1, 0x10>(w, above);
    if (i == 2) return V::template join<0, -1, 0x10>(w, above);
    return V::template join<-2, -3, 0x10>(w, above);
  } else if constexpr (kBits == 6) {
    return i == 0 ? V::template join<4, 2, 0x30>(w, above) : V::template join<0, -2, 0x30>(w, above);
  } else {
    return w;
  }
}

// How the codes of the types that have a table are multiplied: IQ4's as signed bytes (V::kWideZero), MXFP4's raised by 16,
// to 4..28, so that the bounds of five-bit codes hold.
constexpr bool is_wide(BlockType t) { return t == BlockType::kIQ4_NL || t == BlockType::kIQ4_XS; }
alignas(16) constexpr int8_t kMxfp4Raised[16] = {16, 17, 18, 19, 20, 22, 24, 28, 16, 15, 14, 13, 12, 10, 8, 4};

template <class V, BlockType T>
inline __attribute__((always_inline)) auto table_of() {
  if constexpr (is_wide(T))
    return V::wide(kIq4Values);
  else
    return V::small(kMxfp4Raised);
}

// The 6-bit scales and minimums of Q4_K and Q5_K as bytes: [8 groups][16 rows] of each.
template <class V>
void six_bit_scales(const uint8_t* block, int8_t* scales, int8_t* minimums) {
  using I = typename V::I;
  const I low = V::iset1(0x0f0f0f0f), high = V::iset1(0x30303030);
  for (int i = 0; i < 64; i += 4 * V::kLanes) {
    const I first = V::load_line(block + 64 + i), second = V::load_line(block + 128 + i), above = V::load_line(block + 192 + i);
    auto join = [&](I four, I two) { return V::ior(V::iand(four, low), V::iand(two, high)); };
    V::store_line(scales + i, join(first, V::template shifted<4>(above)));
    V::store_line(scales + 64 + i, join(second, above));
    V::store_line(minimums + i, join(V::template shifted<-4>(first), V::template shifted<2>(above)));
    V::store_line(minimums + 64 + i, join(V::template shifted<-4>(second), V::template shifted<-2>(above)));
  }
}

// The 6-bit scales of IQ4_XS less 32, as signed bytes: [8 groups][16 rows].
inline void signed_six_bits(const uint8_t* block, int8_t* scales) {
  const uint8_t *high = block + 32, *low = block + 64;
  for (int g = 0; g < 4; ++g)
    for (int n = 0; n < 16; ++n) {
      const int four = low[g * 16 + n], first = high[g % 2 * 16 + n] >> g / 2 * 2, second = high[g % 2 * 16 + n] >> (g / 2 * 2 + 4);
      scales[g * 16 + n] = int8_t(((four & 15) | (first & 3) << 4) - 32);
      scales[64 + g * 16 + n] = int8_t((four >> 4 | (second & 3) << 4) - 32);
    }
}

}  // namespace
}  // namespace vai
