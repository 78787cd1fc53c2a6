// The gated unit on its own, for gate and up that were not computed together: act(gate) * up.
#pragma once

#include "vai/math.h"
#include "vai/ops.h"

namespace vai {
namespace {

template <class V, class Act>
void glu_rows(const GluArgs& a, int begin, int end, Act act) {
  constexpr int W = V::kLanes;
  for (int m = begin; m < end; ++m) {
    const float *gate = a.gate + size_t(m) * a.ldg, *up = a.up + size_t(m) * a.ldu;
    float* out = a.out + size_t(m) * a.ldo;
    int i = 0;
    for (; i + W <= a.columns; i += W) V::store(out + i, V::mul(act(V::load(gate + i)), V::load(up + i)));
    if (i == a.columns) continue;
    float g[W] = {}, u[W] = {};
    for (int j = 0; i + j < a.columns; ++j) g[j] = gate[i + j], u[j] = up[i + j];
    V::store(g, V::mul(act(V::load(g)), V::load(u)));
    for (int j = 0; i + j < a.columns; ++j) out[i + j] = g[j];
  }
}

template <class V>
void glu(const GluArgs& a, int begin, int end) {
  using F = typename V::F;
  if (a.act == Act::kSilu)
    glu_rows<V>(a, begin, end, [](F x) { return silu<V>(x); });
  else
    glu_rows<V>(a, begin, end, [](F x) { return gelu_tanh<V>(x); });
}

}  // namespace
}  // namespace vai
