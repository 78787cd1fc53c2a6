// Rows of activations made bfloat16, a line of 32 columns at a time.
#include <algorithm>

#include "vai/ops.h"
#include "vai/vec_avx512.h"

#include "ops/fast/tiles.h"

namespace vai {

void narrow_amx(const NarrowArgs& a, int begin, int end) {
  for (int m = begin; m < end; ++m) {
    const float* x = a.x + size_t(m) * a.ldx;
    uint8_t* line = a.out + size_t(m) * narrow_bytes(a.columns);
    int k = 0;
    for (; k + kTileColumns <= a.columns; k += kTileColumns, line += 64)
      put_line(Avx512Vec::load(x + k), Avx512Vec::load(x + k + 16), line);
    if (k == a.columns) continue;
    float last[kTileColumns] = {};
    std::copy(x + k, x + a.columns, last);
    put_line(Avx512Vec::load(last), Avx512Vec::load(last + 16), line);
  }
}

}  // namespace vai
