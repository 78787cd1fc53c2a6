// Rows of activations made bfloat16, on any machine.
#include <cstring>

#include "vai/ops.h"
#include "vai/scalar_types.h"

namespace vai {

void narrow_portable(const NarrowArgs& a, int begin, int end) {
  const int padded = (a.columns + 31) / 32 * 32;
  for (int m = begin; m < end; ++m) {
    const float* x = a.x + size_t(m) * a.ldx;
    uint8_t* const row = a.out + size_t(m) * narrow_bytes(a.columns);
    auto* const out = reinterpret_cast<uint16_t*>(row);
    for (int k = 0; k < a.columns; ++k) out[k] = f32_to_bf16_flushed(x[k]);
    std::memset(out + a.columns, 0, size_t(padded - a.columns) * 2);
  }
}

}  // namespace vai
