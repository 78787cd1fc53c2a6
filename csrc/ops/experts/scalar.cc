// Experts: which rows go to which, those rows side by side, the sum of what comes back, and what a shared one adds to that. Too
// small a part of a step to need more than plain loops.
#include <algorithm>

#include "vai/ops.h"
#include "vai/vec_scalar.h"

#include "vai/math.h"

namespace vai {

// p = softmax of one row of logits; a NaN among them, or no finite largest, makes all of it NaN.
static void softmax(const float* logits, int count, float* p) {
  float top = logits[0], partial[16] = {};
  for (int i = 1; i < count; ++i) top = logits[i] > top || logits[i] != logits[i] ? logits[i] : top;
  for (int i = 0; i < count; i += 16) {
    float x[16] = {};
    const int n = std::min(16, count - i);
    for (int j = 0; j < n; ++j) x[j] = logits[i + j] - top;
    ScalarVec::store(x, exp<ScalarVec>(ScalarVec::load(x)));
    for (int j = 0; j < n; ++j) p[i + j] = x[j], partial[j] = partial[j] + x[j];
  }
  const float total = sum16(partial);
  for (int i = 0; i < count; ++i) p[i] = p[i] / total;
}

void route(const RouteArgs& a, int begin, int end) {
  const int experts = a.routing.experts, used = a.routing.used;
  float p[kMaxExperts];
  bool taken[kMaxExperts];
  for (int m = begin; m < end; ++m) {
    softmax(a.logits + size_t(m) * a.ldl, experts, p);
    std::fill_n(taken, experts, false);
    for (int j = 0; j < used; ++j) {
      int best = 0;
      while (taken[best]) ++best;
      for (int i = best + 1; i < experts; ++i)
        if (!taken[i] && p[i] > p[best]) best = i;
      taken[best] = true;
    }
    int32_t* chosen = a.routing.chosen + size_t(m) * size_t(used);
    float *shares = a.routing.shares + size_t(m) * size_t(used), total = 0.0f;
    for (int i = 0, j = 0; j < used; ++i) {
      if (!taken[i]) continue;
      chosen[j] = i;
      total = total + p[i];
      shares[j++] = p[i];
    }
    if (a.renormalize)
      for (int j = 0; j < used; ++j) shares[j] = shares[j] / total;
    if (a.scale != 1.0f)
      for (int j = 0; j < used; ++j) shares[j] = shares[j] * a.scale;
  }
}

void sort_rows(const Routing& r, int rows) {
  const int pairs = rows * r.used;
  std::fill_n(r.first, r.experts + 1, 0);
  for (int i = 0; i < pairs; ++i) ++r.first[r.chosen[i] + 1];
  int active = 0;
  for (int e = 0; e < r.experts; ++e) {
    if (r.first[e + 1] > 0) r.active[active++] = e;
    r.first[e + 1] += r.first[e];
  }
  r.active[r.experts] = active;
  for (int i = 0; i < pairs; ++i) {  // `first` moves on while its expert's rows are placed, and back afterwards
    const int at = r.first[r.chosen[i]]++;
    r.position[i] = at;
    r.row[at] = i / r.used;
  }
  for (int e = r.experts; e > 0; --e) r.first[e] = r.first[e - 1];
  r.first[0] = 0;
}

void expert_sum(const ExpertSumArgs& a, int begin, int end) {
  const int used = a.routing.used;
  for (int m = begin; m < end; ++m) {
    const int32_t* position = a.routing.position + size_t(m) * size_t(used);
    const float* shares = a.routing.shares + size_t(m) * size_t(used);
    const float* residual = a.residual ? a.residual + size_t(m) * a.ldr : nullptr;
    float* out = a.out + size_t(m) * a.ldo;
    for (int k = 0; k < a.columns; k += 64) {
      const int n = std::min(64, a.columns - k);
      float acc[64] = {};
      for (int j = 0; j < used; ++j) {
        const float *x = a.x + size_t(position[j]) * a.ldx + k, share = shares[j];
        for (int i = 0; i < n; ++i) acc[i] = acc[i] + share * x[i];
      }
      for (int i = 0; i < n; ++i) out[k + i] = residual ? acc[i] + residual[k + i] : acc[i];
    }
  }
}

static float sigmoid(float x) {
  float e[16] = {-x};
  ScalarVec::store(e, exp<ScalarVec>(ScalarVec::load(e)));
  return 1.0f / (1.0f + e[0]);
}

void gated_add(const GatedAddArgs& a, int begin, int end) {
  for (int m = begin; m < end; ++m) {
    const float *gate = a.gate + size_t(m) * a.ldg, *x = a.x + size_t(m) * a.ldx, *residual = a.residual + size_t(m) * a.ldr;
    float partial[16] = {}, *out = a.out + size_t(m) * a.ldo;
    int i = 0;
    for (; i + 16 <= a.gate_columns; i += 16)
      for (int j = 0; j < 16; ++j) partial[j] = partial[j] + gate[i + j] * a.weight[i + j];
    for (int j = 0; i + j < a.gate_columns; ++j) partial[j] = partial[j] + gate[i + j] * a.weight[i + j];
    const float share = sigmoid(sum16(partial));
    for (int k = 0; k < a.columns; ++k) out[k] = x[k] * share + residual[k];
  }
}

}  // namespace vai
