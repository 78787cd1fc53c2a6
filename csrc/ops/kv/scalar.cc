// Keys and values into their pages, as kernels/program.py says (CacheGroup).
#include "vai/ops.h"
#include "vai/scalar_types.h"

namespace vai {

static float same(float x) { return x; }

// One head's key, its elements 16 apart, and value.
template <class Stored, Stored (*convert)(float)>
static void write_floats(const float* k, const float* v, int width, int token, uint8_t* keys, uint8_t* values) {
  Stored* key = (Stored*)keys + token % 16;
  Stored* value = (Stored*)values + size_t(token) * size_t(width);
  for (int d = 0; d < width; ++d) {
    key[d * 16] = convert(k[d]);
    value[d] = convert(v[d]);
  }
}

// A group of `count` elements to codes that stand `stride` apart; returns their scale, a bfloat16.
static uint16_t write_group(const float* x, int count, int8_t* codes, int stride) {
  uint32_t top = 0;  // the order of |x| is the order of its bits
  for (int i = 0; i < count; ++i) {
    const uint32_t magnitude = std::bit_cast<uint32_t>(x[i]) & 0x7fffffffu;
    top = magnitude > top ? magnitude : top;
  }
  const float largest = std::bit_cast<float>(top);
  const bool usable = top < 0x7f800000u && largest >= 0x1p-100f;
  const uint16_t scale = usable ? f32_to_bf16(largest / 127.0f) : top < 0x7f800000u ? 0 : 0x7fc0;
  const float inverse = usable ? 1.0f / bf16_to_f32(scale) : 0.0f;
  for (int i = 0; i < count; ++i) {
    const float product = usable ? x[i] * inverse : 0.0f;
    codes[i * stride] = int8_t((product + 12582912.0f) - 12582912.0f);  // the addition rounds half to even
  }
  return scale;
}

static void write_q8_0(const float* k, const float* v, int width, int token, uint8_t* keys, uint8_t* values) {
  const int scales = kv_scales(width);
  uint16_t* key_scales = (uint16_t*)keys + token % 16;
  uint16_t* value_scales = (uint16_t*)values + token * scales;
  int8_t* key = (int8_t*)keys + 32 * scales + token % 16;
  int8_t* value = (int8_t*)values + 2 * kPageTokens * scales + size_t(token) * size_t(width);
  for (int g = 0; g < scales; ++g) {
    const int first = g * kKvGroup, count = width - first < kKvGroup ? width - first : kKvGroup;
    key_scales[g * 16] = write_group(k + first, count, key + first * 16, 16);
    value_scales[g] = write_group(v + first, count, value + first, 1);
  }
}

void kv_write(const KvWriteArgs& a, int begin, int end) {
  const int width = a.pages.head_dim;
  const auto write = a.pages.type == KvType::kBf16  ? write_floats<uint16_t, f32_to_bf16>
                     : a.pages.type == KvType::kF32 ? write_floats<float, same>
                                                    : write_q8_0;
  for (int m = begin; m < end; ++m)
    for (int h = 0; h < a.pages.kv_heads; ++h) {
      const size_t column = size_t(h) * size_t(width);
      const int sequence = a.sequence_of_row[m], position = a.positions[m];
      write(a.k + size_t(m) * a.ldk + column, a.v + size_t(m) * a.ldv + column, width, position % kPageTokens,
            a.pages.keys(sequence, position, h), a.pages.values(sequence, position, h));
    }
}

}  // namespace vai
