// The fast kind on any machine, slowly: the sums of AMX's TDPBF16PS in plain C++.
//
// An output starts at +0. For each group of 32 columns, ascending, e = sum of activation * weight over its even columns and o
// that over its odd ones are added up, each from +0 and ascending; then the output becomes y + (e + o). Every product joins its
// sum in one rounding (a fused multiply-add). What would be subnormal, going in or coming out, is a zero of its sign.
#include <cmath>

#include "vai/vec_scalar.h"

#include "ops/linear/linear_impl.h"

namespace vai {
namespace {

constexpr double kSmallest = 0x1p-126;
// From here on a sum rounds to kSmallest: it lies as near to that as to the number of 24 bits below it, which is odd.
constexpr double kTiny = kSmallest * (1 - 0x1p-25);

template <class T>
T flushed(T sum, T tiny) {
  return std::fabs(sum) < tiny ? sum * T(0) : sum;
}

// One rounding, though there are two. A product of two bfloat16 has 16 bits and is exact in binary64, and so is a sum of it
// and a binary32 whose bits all lie within 53. Where they do not, one of the two is less than 2^-27 of the other, and the
// other is a binary32 itself: the sum is so close to it that no rounding leads to any other, be it done once or twice. The
// comparison with kTiny, which has 25 bits, goes the right way for the same reason. Above it the conversion rounds to 24 bits
// or, between kTiny and kSmallest, to kSmallest, as it should.
float fused(float sum, float a, float w) { return float(flushed(double(sum) + double(a) * double(w), kTiny)); }

// A sum of two binary32 that is below kSmallest is exact.
float add(float a, float b) { return flushed(a + b, float(kSmallest)); }

// `columns` of 16 rows of a row of blocks, rounded to bfloat16: [columns, zeros up to whole groups][16].
void load_panel(const uint8_t* blocks, BlockType type, int columns, float (*panel)[16]) {
  float row[kPanelColumns] = {};
  for (int n = 0; n < 16; ++n) {
    gather(blocks, type, n, columns, row);
    for (int k = 0; k < (columns + 31) / 32 * 32; ++k) panel[k][n] = bf16_to_f32(f32_to_bf16_flushed(row[k]));
  }
}

// sums[16] of one row, over `columns` of a panel.
void multiply(const uint8_t* narrow, int columns, const float (*panel)[16], float* sums) {
  auto activation = [&](int k) { return bf16_to_f32(load_as<uint16_t>(narrow + 2 * k)); };
  for (int k = 0; k < columns; k += 32) {
    float even[16] = {}, odd[16] = {};
    for (int i = k; i < k + 32; i += 2) {
      const float first = activation(i), second = activation(i + 1);
      for (int n = 0; n < 16; ++n) {
        even[n] = fused(even[n], first, panel[i][n]);
        odd[n] = fused(odd[n], second, panel[i + 1][n]);
      }
    }
    for (int n = 0; n < 16; ++n) sums[n] = add(sums[n], add(even[n], odd[n]));
  }
}

}  // namespace

void linear_fast_portable(const LinearArgs& a, int begin, int end, uint8_t*) {
  const Layout l = layout(a.weight.type);
  const size_t row_bytes = a.weight.row_bytes(), narrow_row = narrow_bytes(a.weight.columns);
  const int blocks = a.gated ? 2 : 1;
  float panel[kPanelColumns][16], sums[kRowsPerPass * kScratchWidth];
  for (int i = begin; i < end; ++i)
    for (int m0 = 0; m0 < a.rows; m0 += kRowsPerPass) {
      const int rows = a.rows - m0 < kRowsPerPass ? a.rows - m0 : kRowsPerPass;
      for (float& sum : sums) sum = 0.0f;
      for (int j = 0; j < blocks; ++j)
        for (int k = 0; k < a.weight.columns; k += kPanelColumns) {
          const int columns = a.weight.columns - k < kPanelColumns ? a.weight.columns - k : kPanelColumns;
          const uint8_t* stored = a.weight.block(i) + size_t(j) * row_bytes + size_t(k / l.columns) * size_t(l.bytes);
          load_panel(stored, a.weight.type, columns, panel);
          for (int r = 0; r < rows; ++r)
            multiply(a.narrow + size_t(m0 + r) * narrow_row + size_t(k) * 2, columns, panel, sums + r * kScratchWidth + j * 16);
        }
      epilogue<ScalarVec>(a, m0, rows, i, 1, sums);
    }
}

}  // namespace vai
