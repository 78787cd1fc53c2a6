// Token rows gathered from the packed table: code * scale, one rounding; each operation rounded where there are more.
#include <algorithm>

#include "vai/ops.h"
#include "vai/scalar_types.h"

namespace vai {

// The code of column k of row `lane` of a block: from its nibble line, and from a line of the bits above the fourth.
static int code(const uint8_t* block, const Layout& l, int lane, int k) {
  const uint8_t byte = block[l.lines + k / 8 * 64 + lane * 4 + k % 4];
  const int low = k % 8 < 4 ? byte & 15 : byte >> 4;
  if (l.bits == 5) return low | (block[l.high + k / 32 * 64 + lane * 4 + k % 4] >> (k % 32 / 4) & 1) << 4;
  if (l.bits == 6) return low | (block[l.high + k / 16 * 64 + lane * 4 + k % 4] >> (k % 16 / 4 * 2) & 3) << 4;
  return low;
}

void gather(const uint8_t* row, BlockType type, int lane, int columns, float* out) {
  const Layout l = layout(type);
  for (int k0 = 0; k0 < columns; k0 += l.columns, row += l.bytes) {
    const int count = std::min(l.columns, columns - k0);
    if (is_raw(type)) {
      float block[256];
      raw_block(type, row + lane * (l.bytes / 16), block);
      std::copy_n(block, count, out + k0);
      continue;
    }
    auto half = [&](int at) { return f16_to_f32(load_as<uint16_t>(row + at + lane * 2)); };
    for (int k = 0; k < count; ++k) {
      float value;
      switch (type) {
        case BlockType::kQ4_0:
          value = float(code(row, l, lane, k) - 8) * half(k / 32 * 32);
          break;
        case BlockType::kQ5_0:
          value = float(code(row, l, lane, k) - 16) * half(k / 32 * 32);
          break;
        case BlockType::kQ4_1:
        case BlockType::kQ5_1:
          value = float(code(row, l, lane, k)) * half(k / 32 * 32) + half(64 + k / 32 * 32);
          break;
        case BlockType::kQ4_K:
        case BlockType::kQ5_K: {
          const int g = k / 32, low = row[64 + g * 16 + lane], above = row[192 + g % 4 * 16 + lane] >> (g < 4 ? 0 : 4);
          const int scale = (low & 15) | (above & 3) << 4, minimum = low >> 4 | (above >> 2 & 3) << 4;
          value = (half(0) * float(scale)) * float(code(row, l, lane, k)) - half(32) * float(minimum);
          break;
        }
        case BlockType::kQ6_K:
          value = (half(0) * float(int8_t(row[64 + k / 16 * 16 + lane]))) * float(code(row, l, lane, k) - 32);
          break;
        case BlockType::kIQ4_NL:
          value = float(kIq4Values[code(row, l, lane, k)]) * half(k / 32 * 32);
          break;
        case BlockType::kIQ4_XS: {
          const int g = k / 32, low = row[64 + g % 4 * 16 + lane] >> (g < 4 ? 0 : 4) & 15;
          const int scale = (low | (row[32 + g % 2 * 16 + lane] >> g / 2 * 2 & 3) << 4) - 32;
          value = (half(0) * float(scale)) * float(kIq4Values[code(row, l, lane, k)]);
          break;
        }
        case BlockType::kMXFP4:
          value = float(kMxfp4Values[code(row, l, lane, k)]) * e8m0_to_f32(row[k / 32 * 16 + lane]);
          break;
        case BlockType::kQ8_0:
          value = float(int(row[64 + (k / 4) * 64 + lane * 4 + k % 4]) - 128) * half(k / 32 * 32);
          break;
        case BlockType::kF16:
          value = f16_to_f32(load_as<uint16_t>(row + (k / 2) * 64 + lane * 4 + k % 2 * 2));
          break;
        case BlockType::kBF16:
          value = bf16_to_f32(load_as<uint16_t>(row + (k / 2) * 64 + lane * 4 + k % 2 * 2));
          break;
        default:
          value = load_as<float>(row + k * 64 + lane * 4);
      }
      out[k0 + k] = value;
    }
  }
}

void embed(const EmbedArgs& a, int begin, int end) {
  for (int m = begin; m < end; ++m) {
    float* out = a.out + size_t(m) * a.ldo;
    gather(a.table.block(a.tokens[m] / 16), a.table.type, a.tokens[m] % 16, a.table.columns, out);
    if (a.scale != 1.0f)
      for (int k = 0; k < a.table.columns; ++k) out[k] = out[k] * a.scale;
  }
}

}  // namespace vai
