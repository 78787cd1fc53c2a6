// Attention of the fast kind with AMX: 16 queries times 32 tokens, or elements, at a time.
#include "vai/vec_avx512.h"

#include "ops/fast/attention_impl.h"
#include "ops/fast/tiles.h"

namespace vai {
namespace {

struct AmxTiles {
  static void multiply(int rows, const uint16_t* a, size_t lda, const uint16_t* b, int groups, float* c, size_t ldc) {
    const size_t a_row = lda * 2, c_row = ldc * 4;
    for (int m = 0; m < rows; m += kTileRows) {
      zero<0>(), zero<1>();
      for (int g = 0; g < groups; ++g) {
        load<3>(b + g * kPairElements, 64);
        load<2>(a + size_t(m) * lda + g * kTile, a_row);
        vai::multiply<0, 2, 3>();
        load<3>(b + g * kPairElements + kTileElements, 64);
        vai::multiply<1, 2, 3>();
      }
      store<0>(c + size_t(m) * ldc, c_row), store<1>(c + size_t(m) * ldc + 16, c_row);
    }
  }

  static void pair(const uint8_t* even, const uint8_t* odd, uint16_t* out) {
    put_pair(_mm256_loadu_si256((const __m256i*)even), _mm256_loadu_si256((const __m256i*)odd), out);
  }
  static void pair(const uint8_t* rows, uint16_t* out) { put_pair(Avx512Vec::load_line(rows), out); }
  static void pairs(const uint8_t* even, const uint8_t* odd, uint16_t* out) {
    put_pairs(Avx512Vec::load_line(even), Avx512Vec::load_line(odd), out, out + kTileElements);
  }
  static void narrow_line(const float* x, uint16_t* out) { put_line(Avx512Vec::load(x), Avx512Vec::load(x + 16), out); }
  static void narrow_pair(const float* even, const float* odd, uint16_t* out) {
    put_pair(Avx512Vec::load(even), Avx512Vec::load(odd), out);
  }
};

}  // namespace

// All tiles have 16 rows: there is room for what comes of those that are no queries.
void attention_fast_amx(const AttentionArgs& a, int unit, uint8_t* scratch) {
  configure(kTileRows);
  attention_fast<Avx512Vec, AmxTiles>(a, unit, scratch);
  release();
}

}  // namespace vai
