// The one wide part of sampling: logits to p = exp(logit / temperature - highest / temperature), and their sum.
#pragma once

#include <cstring>

#include "vai/math.h"
#include "vai/ops.h"

namespace vai {
namespace {

// Sums of every 16th element in binary64, and then of these: the order R16.
template <class V>
class RowSum {
 public:
  // Elements p[0, count), a multiple of 16 behind those before.
  void add(const float* p, int count) {
    for (int i = 0; i < count; i += 16)
      VAI_UNROLL for (int j = 0; j < 16 / kLanes; ++j) sums_[j] += V::load_double(p + i + j * kLanes);
  }

  double total() const {
    double sum[16];
    std::memcpy(sum, sums_, sizeof sum);
    for (int step = 8; step > 0; step /= 2)
      for (int j = 0; j < step; ++j) sum[j] += sum[j + step];
    return sum[0];
  }

 private:
  static constexpr int kLanes = int(sizeof(typename V::Double) / sizeof(double));
  typename V::Double sums_[16 / kLanes] = {};
};

// Elements that are summed up while they are in L1: within the loop that computes them the sums would be in its way.
constexpr int kSummed = 1024;

template <class V>
double probabilities(const ProbabilitiesArgs& a) {
  using F = typename V::F;
  constexpr int kAtOnce = 8, kStep = kAtOnce * V::kLanes;
  const F temperature = V::set1(a.temperature);
  const F highest = V::div(V::set1(a.highest), temperature);  // dividing keeps the order, so this is the highest quotient
  auto step = [&](const float* logits, float* p) {
    F x[kAtOnce];
    VAI_UNROLL for (int i = 0; i < kAtOnce; ++i) {
      x[i] = V::load(logits + i * V::kLanes);
      if (a.temperature != 1.0f) x[i] = V::div(x[i], temperature);
      x[i] = V::sub(x[i], highest);
    }
    exp<V>(x);
    VAI_UNROLL for (int i = 0; i < kAtOnce; ++i) V::store(p + i * V::kLanes, x[i]);
  };
  RowSum<V> sum;
  for (int first = 0; first < a.count; first += kSummed) {
    const int end = a.count - first < kSummed ? a.count : first + kSummed;
    int i = first;
    for (; i + kStep <= end; i += kStep) step(a.logits + i, a.p + i);
    sum.add(a.p + first, i - first);
    if (const int rest = end - i; rest > 0) {
      float logits[kStep], p[kStep];
      for (int j = 0; j < kStep; ++j) logits[j] = j < rest ? a.logits[i + j] : -__builtin_inff();  // of which p is 0
      step(logits, p);
      sum.add(p, kStep);
      std::memcpy(a.p + i, p, size_t(rest) * sizeof(float));
    }
  }
  return sum.total();
}

}  // namespace
}  // namespace vai
