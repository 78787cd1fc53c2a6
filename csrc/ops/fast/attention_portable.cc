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
};

}  // namespace

void attention_fast_portable(const AttentionArgs& a, int unit, uint8_t* scratch) {
  attention_fast<ScalarVec, PortableTiles>(a, unit, scratch);
}

}  // namespace vai
