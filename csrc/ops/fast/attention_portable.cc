// Attention of the fast kind on any machine, slowly.
#include "vai/vec_scalar.h"

#include "ops/fast/attention_impl.h"
#include "ops/fast/sums.h"

namespace vai {
namespace {

struct PortableTiles {
  static void multiply(int rows, const uint16_t* a, size_t lda, const uint16_t* b, int groups, float* c, size_t ldc) {
    for (int r = 0; r < rows; ++r, a += lda, c += ldc)
      for (int half = 0; half < 2; ++half) {
        float sums[16] = {};
        for (int g = 0; g < groups; ++g) {
          const uint16_t* tile = b + g * kPairElements + half * kTileElements;
          float even[16] = {}, odd[16] = {};
          for (int i = 0; i < 16; ++i, tile += 32) {
            const float first = bf16_to_f32(a[g * kTile + 2 * i]), second = bf16_to_f32(a[g * kTile + 2 * i + 1]);
            for (int n = 0; n < 16; ++n) {
              even[n] = fused(even[n], first, bf16_to_f32(tile[2 * n]));
              odd[n] = fused(odd[n], second, bf16_to_f32(tile[2 * n + 1]));
            }
          }
          for (int n = 0; n < 16; ++n) sums[n] = add(sums[n], add(even[n], odd[n]));
        }
        for (int n = 0; n < 16; ++n) c[half * 16 + n] = sums[n];
      }
  }

  static void pair(const uint8_t* even, const uint8_t* odd, uint16_t* out) {
    auto normal = [](uint16_t x) { return uint16_t(x & 0x7f80 ? x : x & 0x8000); };
    for (int i = 0; i < 16; ++i) {
      out[2 * i] = normal(load_as<uint16_t>(even + 2 * i));
      out[2 * i + 1] = normal(load_as<uint16_t>(odd + 2 * i));
    }
  }
  static void pair(const uint8_t* rows, uint16_t* out) { pair(rows, rows + 32, out); }
  static void pairs(const uint8_t* even, const uint8_t* odd, uint16_t* out) {
    pair(even, odd, out), pair(even + 32, odd + 32, out + kTileElements);
  }
  static void narrow_line(const float* x, uint16_t* out) {
    for (int i = 0; i < kTile; ++i) out[i] = f32_to_bf16_flushed(x[i]);
  }
  static void narrow_pair(const float* even, const float* odd, uint16_t* out) {
    for (int i = 0; i < 16; ++i) out[2 * i] = f32_to_bf16_flushed(even[i]), out[2 * i + 1] = f32_to_bf16_flushed(odd[i]);
  }
};

}  // namespace

void attention_fast_portable(const AttentionArgs& a, int unit, uint8_t* scratch) {
  attention_fast<ScalarVec, PortableTiles>(a, unit, scratch);
}

}  // namespace vai
