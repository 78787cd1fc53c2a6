// Token rows gathered from the packed table: code * scale, one rounding.
#include <algorithm>

#include "vai/ops.h"
#include "vai/scalar_types.h"

namespace vai {

static void gather(const uint8_t* row, BlockType type, int lane, int columns, float* out) {
  const int width = block_columns(type);
  for (int k0 = 0; k0 < columns; k0 += width, row += block_bytes(type)) {
    const int count = std::min(width, columns - k0);
    for (int k = 0; k < count; ++k) {
      float value;
      switch (type) {
        case BlockType::kQ4_0: {
          const int p = k % 8 < 4 ? 2 * (k % 4) : 2 * (k % 4) + 1;
          const uint8_t byte = row[64 + (k / 8) * 64 + lane * 4 + p / 2];
          value = float(int(p % 2 ? byte >> 4 : byte & 15) - 8) * f16_to_f32(load_as<uint16_t>(row + k / 32 * 32 + lane * 2));
          break;
        }
        case BlockType::kQ8_0:
          value = float(int(row[64 + (k / 4) * 64 + lane * 4 + k % 4]) - 128) *
                  f16_to_f32(load_as<uint16_t>(row + k / 32 * 32 + lane * 2));
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
  for (int m = begin; m < end; ++m)
    gather(a.table.block(a.tokens[m] / 16), a.table.type, a.tokens[m] % 16, a.table.columns, a.out + size_t(m) * a.ldo);
}

}  // namespace vai
