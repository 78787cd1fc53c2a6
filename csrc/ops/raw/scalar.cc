// Raw blocks: 256 weights of a row as the checkpoint has them, made binary32 one by one. The formats are ggml's
// (ggml-common.h and ggml-quants.c); every operation is rounded on its own, in the order of the format's own package.
//
// A block cannot lead out of bounds: every index below has as many bits as its table has entries.
#include "vai/ops.h"
#include "vai/scalar_types.h"

#include "points.h"

namespace vai {
namespace {

float half(const uint8_t* p) { return f16_to_f32(load_as<uint16_t>(p)); }

// The signs of eight values by an index of seven bits: an even number of them is negative.
unsigned even_signs(unsigned index) { return index | (unsigned(__builtin_popcount(index)) & 1) << 7; }

// `count` values of a point of a codebook, times `scale`; bit i of `signs` negates the i-th.
float* put(const uint8_t* point, int count, float scale, unsigned signs, float* y) {
  for (int i = 0; i < count; ++i) *y++ = scale * float(point[i]) * (signs >> i & 1 ? -1.0f : 1.0f);
  return y;
}

void q2_k(const uint8_t* b, float* y) {
  const float d = half(b + 80), dmin = half(b + 82);
  for (int i = 0; i < 16; ++i) {
    const uint8_t* codes = b + 16 + i / 8 * 32 + i % 2 * 16;
    const float scale = d * float(b[i] & 15), minimum = dmin * float(b[i] >> 4);
    for (int l = 0; l < 16; ++l) *y++ = scale * float(codes[l] >> i / 2 % 4 * 2 & 3) - minimum;
  }
}

void q3_k(const uint8_t* b, float* y) {
  const uint8_t* scales = b + 96;
  const float d = half(b + 108);
  for (int i = 0; i < 16; ++i) {
    const uint8_t *codes = b + 32 + i / 8 * 32 + i % 2 * 16, *above = b + i % 2 * 16;
    const int low = i < 8 ? scales[i] & 15 : scales[i - 8] >> 4, high = scales[8 + i % 4] >> i / 4 * 2 & 3;
    const float scale = d * float((low | high << 4) - 32);
    for (int l = 0; l < 16; ++l)
      *y++ = scale * float((codes[l] >> i / 2 % 4 * 2 & 3) - (above[l] >> i / 2 & 1 ? 0 : 4));
  }
}

// Eight values of -1, 0 and 1, all moved by an eighth.
float* put_ternary(unsigned index, float scale, bool down, float* y) {
  const float delta = down ? -0.125f : 0.125f;
  for (int i = 0; i < 8; ++i) *y++ = scale * (float(int(kIq1.at[index][i]) - 1) + delta);
  return y;
}

void iq1_s(const uint8_t* b, float* y) {
  const float d = half(b);
  for (int t = 0; t < 32; ++t) {
    const unsigned high = load_as<uint16_t>(b + 34 + t / 4 * 2);
    const float scale = d * float(2 * (high >> 12 & 7) + 1);
    y = put_ternary(b[2 + t] | (high >> t % 4 * 3 & 7) << 8, scale, high >> 15, y);
  }
}

void iq1_m(const uint8_t* b, float* y) {
  auto word = [&](int i) { return unsigned(load_as<uint16_t>(b + 48 + 2 * i)); };
  const float d = f16_to_f32(uint16_t(word(0) >> 12 | (word(1) >> 8 & 0xf0) | (word(2) >> 4 & 0xf00) | (word(3) & 0xf000)));
  for (int t = 0; t < 32; ++t) {
    const unsigned high = b[32 + t / 2] >> t % 2 * 4 & 15;
    const float scale = d * float(2 * (word(t / 8) >> t / 2 % 4 * 3 & 7) + 1);
    y = put_ternary(b[t] | (high & 7) << 8, scale, high >> 3, y);
  }
}

void iq2_xxs(const uint8_t* b, float* y) {
  const float d = half(b);
  for (int g = 0; g < 8; ++g) {
    const uint8_t* points = b + 2 + 8 * g;
    const uint32_t rest = load_as<uint32_t>(points + 4);
    const float scale = d * (0.5f + float(rest >> 28)) * 0.25f;
    for (int j = 0; j < 4; ++j) y = put(kIq2Xxs.at[points[j]], 8, scale, even_signs(rest >> 7 * j & 127), y);
  }
}

void iq2_xs(const uint8_t* b, float* y) {
  const float d = half(b);
  for (int t = 0; t < 32; ++t) {
    const unsigned code = load_as<uint16_t>(b + 2 + 2 * t);
    const float scale = d * (0.5f + float(b[66 + t / 4] >> t / 2 % 2 * 4 & 15)) * 0.25f;
    y = put(kIq2Xs.at[code & 511], 8, scale, even_signs(code >> 9), y);
  }
}

void iq2_s(const uint8_t* b, float* y) {
  const float d = half(b);
  for (int t = 0; t < 32; ++t) {
    const unsigned index = b[2 + t] | (b[66 + t / 4] >> t % 4 * 2 & 3u) << 8;
    const float scale = d * (0.5f + float(b[74 + t / 4] >> t / 2 % 2 * 4 & 15)) * 0.25f;
    y = put(kIq2S.at[index], 8, scale, b[34 + t], y);
  }
}

void iq3_xxs(const uint8_t* b, float* y) {
  const float d = half(b);
  for (int g = 0; g < 8; ++g) {
    const uint32_t rest = load_as<uint32_t>(b + 66 + 4 * g);
    const float scale = d * (0.5f + float(rest >> 28)) * 0.5f;
    for (int j = 0; j < 8; ++j)
      y = put(kIq3Xxs.at[b[2 + 8 * g + j]], 4, scale, even_signs(rest >> j / 2 * 7 & 127) >> j % 2 * 4, y);
  }
}

void iq3_s(const uint8_t* b, float* y) {
  const float d = half(b);
  for (int t = 0; t < 64; ++t) {
    const unsigned index = b[2 + t] | (b[66 + t / 8] >> t % 8 & 1u) << 8;
    const float scale = d * float(1 + 2 * (b[106 + t / 16] >> t / 8 % 2 * 4 & 15));
    y = put(kIq3S.at[index], 4, scale, b[74 + t / 2] >> t % 2 * 4, y);
  }
}

// Five values of -1, 0 and 1 to a byte, as the digits of a fraction in base 3.
void tq1_0(const uint8_t* b, float* y) {
  constexpr unsigned kPowers[5] = {1, 3, 9, 27, 81};
  const float d = half(b + 52);
  auto run = [&](const uint8_t* from, int width, int digits) {
    for (int p = 0; p < digits; ++p)
      for (int i = 0; i < width; ++i) *y++ = d * float(int((from[i] * kPowers[p] & 255) * 3 >> 8) - 1);
  };
  run(b, 32, 5);
  run(b + 32, 16, 5);
  run(b + 48, 4, 4);
}

void tq2_0(const uint8_t* b, float* y) {
  const float d = half(b + 64);
  for (int e = 0; e < 256; ++e) y[e] = d * float((b[e / 128 * 32 + e % 32] >> e % 128 / 32 * 2 & 3) - 1);
}

}  // namespace

void raw_block(BlockType type, const uint8_t* block, float* out) {
  switch (type) {
    case BlockType::kQ2_K: return q2_k(block, out);
    case BlockType::kQ3_K: return q3_k(block, out);
    case BlockType::kIQ1_S: return iq1_s(block, out);
    case BlockType::kIQ1_M: return iq1_m(block, out);
    case BlockType::kIQ2_XXS: return iq2_xxs(block, out);
    case BlockType::kIQ2_XS: return iq2_xs(block, out);
    case BlockType::kIQ2_S: return iq2_s(block, out);
    case BlockType::kIQ3_XXS: return iq3_xxs(block, out);
    case BlockType::kIQ3_S: return iq3_s(block, out);
    case BlockType::kTQ1_0: return tq1_0(block, out);
    case BlockType::kTQ2_0: return tq2_0(block, out);
    default: return;
  }
}

void raw_columns(BlockType type, const uint8_t* tile, float* panel) {
  const int bytes = layout(type).bytes / 16;
  float row[256];
  for (int n = 0; n < 16; ++n) {
    raw_block(type, tile + n * bytes, row);
    for (int k = 0; k < 256; ++k) panel[k * 16 + n] = row[k];
  }
}

}  // namespace vai
