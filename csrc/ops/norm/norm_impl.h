// RMSNorm fused with the quantization of its result: a row is read twice and nothing but codes need be written.
#pragma once

#include <bit>

#include "vai/math.h"
#include "vai/ops.h"

namespace vai {
namespace {

template <class V>
float sum_of_squares(const float* x, int n) {
  using F = typename V::F;
  constexpr int W = V::kLanes, H = 16 / W;
  F p[H];
  for (int h = 0; h < H; ++h) p[h] = V::set1(0.0f);
  int i = 0;
  for (; i + 16 <= n; i += 16)
    for (int h = 0; h < H; ++h) {
      const F v = V::load(x + i + h * W);
      p[h] = V::add(p[h], V::mul(v, v));
    }
  float partial[16];
  for (int h = 0; h < H; ++h) V::store(partial + h * W, p[h]);
  for (int j = 0; i + j < n; ++j) partial[j] = partial[j] + x[i + j] * x[i + j];
  return sum16(partial);
}

// One group of 32 values: am = max |x|; codes rint(x * (127 / am)), scale am / 127. Below 2^-100 all is zero; a value that
// is not finite makes the scale a NaN and the codes zero.
template <class V>
void quantize_group(const float* y, int8_t* codes, float* scale, int32_t* sum) {
  using F = typename V::F;
  using I = typename V::I;
  constexpr int W = V::kLanes;
  I largest = V::iset1(0);  // the order of |x| is the order of its bits
  for (int i = 0; i < kGroup; i += W)
    largest = V::imax(largest, V::iand(V::bits(V::load(y + i)), V::iset1(0x7fffffff)));
  float lanes[W];
  V::store(lanes, V::from_bits(largest));
  int32_t top = 0;
  for (int i = 0; i < W; ++i) {
    const int32_t b = std::bit_cast<int32_t>(lanes[i]);
    top = b > top ? b : top;
  }
  const float am = std::bit_cast<float>(top);
  const bool finite = top < 0x7f800000, some = am >= 0x1p-100f;
  *scale = !finite ? std::bit_cast<float>(0x7fc00000) : some ? am / 127.0f : 0.0f;
  if (!finite || !some) {
    for (int i = 0; i < kGroup; ++i) codes[i] = 0;
    *sum = 0;
    return;
  }
  const F inverse = V::set1(127.0f / am);
  I total = V::iset1(0);
  for (int i = 0; i < kGroup; i += W) {
    const I q = V::to_int(V::round(V::mul(V::load(y + i), inverse)));
    total = V::iadd(total, q);
    V::store_i8(codes + i, q);
  }
  float sums[W];
  V::store(sums, V::from_bits(total));
  int32_t s = 0;
  for (int i = 0; i < W; ++i) s += std::bit_cast<int32_t>(sums[i]);
  *sum = s;
}

template <class V>
void norm(const NormArgs& a, int begin, int end) {
  using F = typename V::F;
  constexpr int W = V::kLanes;
  const int groups = a.columns / kGroup;
  for (int m = begin; m < end; ++m) {
    const float* x = a.x + size_t(m) * a.ldx;
    float* out = a.out ? a.out + size_t(m) * a.ldo : nullptr;
    float r = 1.0f;
    if (a.weight) {
      const float mean = sum_of_squares<V>(x, a.columns) / float(a.columns);
      r = 1.0f / __builtin_sqrtf(mean + a.epsilon);
    }
    const int first = m / a.row_block * a.row_block, lane = m - first;
    const int R = a.rows - first < a.row_block ? a.rows - first : a.row_block;
    uint8_t* record = a.packed ? a.packed + size_t(first) * size_t(groups) * kRecordBytes : nullptr;
    for (int k = 0; k < a.columns; k += kGroup) {
      float y[kGroup];
      const int count = a.columns - k < kGroup ? a.columns - k : kGroup;
      if (!a.weight) {
        for (int i = 0; i < count; ++i) y[i] = x[k + i];
      } else if (count == kGroup) {
        for (int i = 0; i < kGroup; i += W) {
          const F scaled = V::mul(V::load(x + k + i), V::set1(r));
          V::store(y + i, V::mul(scaled, V::load(a.weight + k + i)));
        }
      } else {
        for (int i = 0; i < count; ++i) y[i] = (x[k + i] * r) * a.weight[k + i];
      }
      if (out)
        for (int i = 0; i < count; ++i) out[k + i] = y[i];
      if (record) {
        quantize_group<V>(y, (int8_t*)record + lane * kGroup, (float*)(record + R * 32) + lane,
                          (int32_t*)(record + R * 36) + lane);
        record += R * kRecordBytes;
      }
    }
  }
}

}  // namespace
}  // namespace vai
