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

// How a group becomes codes: am = max |x|; codes rint(x * (127 / am)), scale am / 127. Below 2^-100 all is zero; a value
// that is not finite makes the scale a NaN and the codes zero.
struct Quantization {
  float scale, inverse;  // inverse 0: all codes are zero
};

template <class V>
Quantization quantization(const float* y, int count) {
  using I = typename V::I;
  constexpr int W = V::kLanes;
  I largest = V::iset1(0);  // the order of |x| is the order of its bits
  for (int i = 0; i < count; i += W)
    largest = V::imax(largest, V::iand(V::bits(V::load(y + i)), V::iset1(0x7fffffff)));
  float lanes[W];
  V::store(lanes, V::from_bits(largest));
  int32_t top = 0;
  for (int i = 0; i < W; ++i) {
    const int32_t b = std::bit_cast<int32_t>(lanes[i]);
    top = b > top ? b : top;
  }
  const float am = std::bit_cast<float>(top);
  if (top >= 0x7f800000) return {std::bit_cast<float>(0x7fc00000), 0.0f};
  if (am < 0x1p-100f) return {0.0f, 0.0f};
  return {am / 127.0f, 127.0f / am};
}

// Codes of `count` values of a group, a multiple of 16; returns their sum.
template <class V>
int32_t quantize(const float* y, int count, float inverse, int8_t* codes) {
  using I = typename V::I;
  constexpr int W = V::kLanes;
  if (inverse == 0.0f) {
    for (int i = 0; i < count; ++i) codes[i] = 0;
    return 0;
  }
  I total = V::iset1(0);
  for (int i = 0; i < count; i += W) {
    const I q = V::to_int(V::round(V::mul(V::load(y + i), V::set1(inverse))));
    total = V::iadd(total, q);
    V::store_i8(codes + i, q);
  }
  float sums[W];
  V::store(sums, V::from_bits(total));
  int32_t sum = 0;
  for (int i = 0; i < W; ++i) sum += std::bit_cast<int32_t>(sums[i]);
  return sum;
}

// One group of row `lane` of R into its record.
template <class V>
void quantize_group(const float* y, uint8_t* record, int lane, int R) {
  const Quantization q = quantization<V>(y, kGroup);
  ((int32_t*)(record + R * 36))[lane] = quantize<V>(y, kGroup, q.inverse, (int8_t*)record + lane * 32);
  ((float*)(record + R * 32))[lane] = q.scale;
}

template <class V>
void quantize_wide_group(const float* y, uint8_t* record, int lane, int R) {
  const Quantization q = quantization<V>(y, kWideGroup);
  ((float*)(record + R * 256))[lane] = q.scale;
  int16_t* of32 = (int16_t*)(record + R * 260);
  int16_t* of16 = (int16_t*)(record + R * 276);
  for (int i = 0; i < 8; ++i) {
    int8_t* codes = (int8_t*)record + wide_codes(R, lane, i);
    const int32_t first = quantize<V>(y + 32 * i, 16, q.inverse, codes);
    const int32_t second = quantize<V>(y + 32 * i + 16, 16, q.inverse, codes + 16);
    of32[(i / 2 * R + lane) * 2 + i % 2] = int16_t(first + second);
    of16[(i * R + lane) * 2] = int16_t(first);
    of16[(i * R + lane) * 2 + 1] = int16_t(second);
  }
}

template <class V>
void norm(const NormArgs& a, int begin, int end) {
  using F = typename V::F;
  constexpr int W = V::kLanes;
  for (int unit = begin * a.heads; unit < end * a.heads; ++unit) {
    const int m = unit / a.heads, head = unit % a.heads * a.columns;
    const float* x = a.x + size_t(a.source ? a.source[m] : m) * a.ldx + head;
    float* out = a.out ? a.out + size_t(m) * a.ldo + head : nullptr;
    float r = 1.0f;
    if (a.weight) {
      const float mean = sum_of_squares<V>(x, a.columns) / float(a.columns);
      r = 1.0f / __builtin_sqrtf(mean + a.epsilon);
    }
    const int first = m / a.row_block * a.row_block, lane = m - first;
    const int R = a.rows - first < a.row_block ? a.rows - first : a.row_block;
    uint8_t* record = a.packed32 ? a.packed32 + size_t(first) * packed_row_bytes(kGroup, a.columns) : nullptr;
    uint8_t* wide = a.packed256 ? a.packed256 + size_t(first) * packed_row_bytes(kWideGroup, a.columns) : nullptr;
    for (int k = 0; k < a.columns; k += kWideGroup) {
      float y[kWideGroup];
      const int count = a.columns - k < kWideGroup ? a.columns - k : kWideGroup, whole = a.weight ? count / W * W : 0;
      for (int i = 0; i < whole; i += W) {
        const F scaled = V::mul(V::load(x + k + i), V::set1(r));
        V::store(y + i, V::mul(scaled, V::load(a.weight + k + i)));
      }
      for (int i = whole; i < count; ++i) y[i] = a.weight ? (x[k + i] * r) * a.weight[k + i] : x[k + i];
      if (a.residual)
        for (int i = 0; i < count; ++i) y[i] = y[i] + a.residual[size_t(m) * a.ldr + size_t(k + i)];
      if (out)
        for (int i = 0; i < count; ++i) out[k + i] = y[i];
      if (record)
        for (int i = 0; i < count; i += kGroup, record += R * record_bytes(kGroup)) quantize_group<V>(y + i, record, lane, R);
      if (wide) {
        quantize_wide_group<V>(y, wide, lane, R);
        wide += R * record_bytes(kWideGroup);
      }
    }
  }
}

}  // namespace
}  // namespace vai
