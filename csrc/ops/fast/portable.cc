// Linear layers of the fast kind on any machine, slowly.
#include <cstring>

#include "vai/vec_scalar.h"

#include "ops/fast/sums.h"
#include "ops/linear/linear_impl.h"

namespace vai {
namespace {

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

// What epilogue() does with a gated layer, rounded to bfloat16.
void narrow_epilogue(const LinearArgs& a, int first_row, int rows, int block, const float* sums) {
  for (int r = 0; r < rows; ++r) {
    float y[16];
    uint16_t narrow[16];
    ScalarVec::store(y, gated_unit<ScalarVec>(a, block, sums + r * kScratchWidth, 0));
    for (int n = 0; n < 16; ++n) narrow[n] = f32_to_bf16_flushed(y[n]);
    std::memcpy(a.narrow_out + size_t(first_row + r) * a.narrow_out_row + size_t(block) * sizeof narrow, narrow, sizeof narrow);
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
      if (a.narrow_out)
        narrow_epilogue(a, m0, rows, i, sums);
      else
        epilogue<ScalarVec>(a, m0, rows, i, 1, sums);
    }
}

}  // namespace vai
