// Keys and values into their pages: K as [kv_heads][2][head_dim][16 tokens], then V as [kv_heads][32][head_dim].
#include "vai/ops.h"
#include "vai/scalar_types.h"

namespace vai {

template <class Stored, class Convert>
static void write(const KvWriteArgs& a, int begin, int end, Convert convert) {
  const int heads = a.pages.kv_heads, width = a.pages.head_dim;
  for (int m = begin; m < end; ++m) {
    const int token = a.positions[m] % kPageTokens;
    Stored* keys = (Stored*)a.pages.layer(a.sequence_of_row[m], a.positions[m]);
    Stored* values = keys + size_t(kPageTokens) * size_t(heads) * size_t(width);
    for (int h = 0; h < heads; ++h) {
      const float *k = a.k + size_t(m) * a.ldk + size_t(h) * size_t(width), *v = a.v + size_t(m) * a.ldv + size_t(h) * size_t(width);
      Stored* key = keys + size_t(h * 2 + token / 16) * size_t(width) * 16 + token % 16;
      Stored* value = values + (size_t(h) * kPageTokens + size_t(token)) * size_t(width);
      for (int d = 0; d < width; ++d) {
        key[d * 16] = convert(k[d]);
        value[d] = convert(v[d]);
      }
    }
  }
}

void kv_write(const KvWriteArgs& a, int begin, int end) {
  if (a.pages.type == KvType::kBf16)
    write<uint16_t>(a, begin, end, f32_to_bf16);
  else
    write<float>(a, begin, end, [](float x) { return x; });
}

}  // namespace vai
