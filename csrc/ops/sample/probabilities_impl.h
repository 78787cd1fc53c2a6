// The one wide part of sampling: logits to p = exp(logit / temperature - max).
#pragma once

#include "vai/math.h"
#include "vai/ops.h"

namespace vai {
namespace {

template <class V>
bool probabilities(const ProbabilitiesArgs& a, float* maximum) {
  using F = typename V::F;
  constexpr int W = V::kLanes;
  const int wide = a.count / W * W;
  const F temperature = V::set1(a.temperature), lowest = V::set1(-__builtin_inff());
  float tail[W];
  for (int i = 0; i < W; ++i) tail[i] = wide + i < a.count ? a.logits[wide + i] : -__builtin_inff();
  auto scaled = [&](int i) {
    const F x = V::load(i < wide ? a.logits + i : tail);
    return a.temperature == 1.0f ? x : V::div(x, temperature);
  };
  F top = lowest, bad = V::set1(0.0f);
  const bool known = a.highest == a.highest;
  if (known) top = V::set1(a.highest);
  for (int i = 0; i < a.count && !known; i += W) {
    const F x = V::load(i < wide ? a.logits + i : tail);
    bad = V::select(V::unordered(x), V::set1(1.0f), bad);
    top = V::max(x, top);
  }
  top = V::div(top, temperature);  // dividing keeps the order, so this is the highest quotient
  float lanes[W], flags[W];
  V::store(lanes, top);
  V::store(flags, bad);
  float m = lanes[0];
  bool nan = false;
  for (int i = 0; i < W; ++i) {
    m = lanes[i] > m ? lanes[i] : m;
    nan |= flags[i] != 0.0f;
  }
  *maximum = m;
  if (nan) return false;
  for (int i = 0; i < a.count; i += W) {
    const F p = exp<V>(V::sub(scaled(i), V::set1(m)));
    if (i < wide) {
      V::store(a.p + i, p);
    } else {
      V::store(lanes, p);
      for (int j = 0; i + j < a.count; ++j) a.p[i + j] = lanes[j];
    }
  }
  return true;
}

}  // namespace
}  // namespace vai
