// Our own transcendentals and ordered sums over a vector trait: every operation rounded, the same bits everywhere.
// Include it behind the trait.
#pragma once

#include <cstdint>

namespace vai {
namespace {

// exp of the project's specification, of several registers: x > 88.3 is clamped, x < -87.3 gives +0, NaN passes. At most
// 0.97 ulp off. Each step is done for all registers before the next: of one register every step waits for the one before it,
// and a processor does not look far enough ahead to fill that time with what comes next.
template <class V, int kCount>
inline void exp(typename V::F (&x)[kCount]) {
  using F = typename V::F;
  F n[kCount], r[kCount], p[kCount];
#define VAI_STEP(to, expression)                       \
  VAI_UNROLL for (int i = 0; i < kCount; ++i) {        \
    to[i] = expression;                                \
    if constexpr (kCount > 1) V::keep_in_order(to[i]); \
  }
  VAI_STEP(n, V::mul(V::min(V::set1(88.3f), x[i]), V::set1(1.44269504f)))
  VAI_STEP(n, V::round(n[i]))
  VAI_STEP(r, V::sub(V::min(V::set1(88.3f), x[i]), V::mul(n[i], V::set1(0.693359375f))))
  VAI_STEP(r, V::sub(r[i], V::mul(n[i], V::set1(-2.12194440e-4f))))
  VAI_STEP(p, V::mul(V::set1(1.9875691500e-4f), r[i]))
  constexpr float kC[4] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f};
  for (float c : kC) {
    VAI_STEP(p, V::add(p[i], V::set1(c)))
    VAI_STEP(p, V::mul(p[i], r[i]))
  }
  VAI_STEP(p, V::add(p[i], V::set1(5.0000001201e-1f)))
  VAI_STEP(p, V::mul(p[i], V::mul(r[i], r[i])))
  VAI_STEP(p, V::add(p[i], r[i]))
  VAI_STEP(p, V::add(p[i], V::set1(1.0f)))
  VAI_STEP(p, V::from_bits(V::iadd(V::bits(p[i]), V::to_exponent(V::to_int(n[i])))))
  VAI_STEP(x, V::where(V::not_less(x[i], V::set1(-87.3f)), p[i]))
#undef VAI_STEP
}

template <class V>
inline typename V::F exp(typename V::F x) {
  typename V::F one[1] = {x};
  exp<V>(one);
  return one[0];
}

// tanh (Cephes): a polynomial below 0.625, else 1 - 2 / (exp(2 |x|) + 1) with the sign of x. NaN passes.
template <class V>
inline typename V::F tanh(typename V::F x) {
  using F = typename V::F;
  const F size = V::from_bits(V::iand(V::bits(x), V::iset1(INT32_MAX)));
  const F far = V::sub(V::set1(1.0f), V::div(V::set1(2.0f), V::add(exp<V>(V::add(size, size)), V::set1(1.0f))));
  const F signed_far = V::from_bits(V::ior(V::bits(far), V::iand(V::bits(x), V::iset1(INT32_MIN))));
  constexpr float kC[4] = {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f};
  const F z = V::mul(x, x);
  F p = V::set1(-5.70498872745e-3f);
  for (float c : kC) p = V::add(V::mul(p, z), V::set1(c));
  const F near = V::add(V::mul(V::mul(p, z), x), x);
  return V::select(V::greater_equal(size, V::set1(0.625f)), signed_far, near);
}

// silu(x) = x / (1 + exp(-x)).
template <class V>
inline typename V::F silu(typename V::F x) {
  const auto negative = V::from_bits(V::iadd(V::bits(x), V::iset1(INT32_MIN)));  // flips the sign bit
  return V::div(x, V::add(V::set1(1.0f), exp<V>(negative)));
}

// gelu(x) = 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) (Hendrycks and Gimpel 2016).
template <class V>
inline typename V::F gelu_tanh(typename V::F x) {
  const auto cube = V::mul(V::mul(x, x), x);
  const auto bent = tanh<V>(V::mul(V::set1(0.7978846f), V::add(x, V::mul(V::set1(0.044715f), cube))));
  return V::mul(V::mul(V::set1(0.5f), x), V::add(V::set1(1.0f), bent));
}

// cap * tanh(x / cap).
template <class V>
inline typename V::F softcapped(typename V::F x, float cap) {
  return V::mul(V::set1(cap), tanh<V>(V::div(x, V::set1(cap))));
}

// 16 partial sums to one: p[j] += p[j + 8], then + 4, + 2, + 1 (the order called R16).
inline float sum16(float* p) {
  for (int step = 8; step > 0; step >>= 1)
    for (int j = 0; j < step; ++j) p[j] = p[j] + p[j + step];
  return p[0];
}

}  // namespace
}  // namespace vai
