#include "core/sampler.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <utility>

namespace vai {
namespace {

// Philox4x32-10 (Salmon et al., 2011): counter (position, choice, 0, 0), key = the seed's halves; 53 bits of the first
// two words, in [0, 1).
double uniform(uint64_t seed, uint32_t position, uint32_t choice) {
  uint32_t c[4] = {position, choice, 0, 0}, k[2] = {uint32_t(seed), uint32_t(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c[0], b = uint64_t(0xCD9E8D57u) * c[2];
    const uint32_t next[4] = {uint32_t(b >> 32) ^ c[1] ^ k[0], uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ k[1], uint32_t(a)};
    std::copy(next, next + 4, c);
    k[0] += 0x9E3779B9u;
    k[1] += 0xBB67AE85u;
  }
  return (double(c[0] >> 5) * 0x1p26 + double(c[1] >> 6)) * 0x1p-53;
}

// Natural logarithm of x > 0 in binary64, each operation rounded: the odd series of atanh around 1.
double log64(double x) {
  int exponent;
  double m = std::frexp(x, &exponent);
  if (m < 0.7071067811865476) {
    m *= 2.0;
    --exponent;
  }
  const double t = (m - 1.0) / (m + 1.0), z = t * t;
  double sum = 1.0 / 21.0;
  for (int d = 19; d >= 1; d -= 2) sum = 1.0 / double(d) + z * sum;
  return double(exponent) * 0.6931471805599453 + (2.0 * t) * sum;
}

// A candidate as one number that sorts by (p descending, id ascending) when sorted descending. p >= 0: its bits are ordered.
uint64_t candidate(float p, int id) { return uint64_t(std::bit_cast<uint32_t>(p)) << 32 | (0xffffffffu - uint32_t(id)); }
float probability(uint64_t c) { return std::bit_cast<float>(uint32_t(c >> 32)); }
int identity(uint64_t c) { return int(0xffffffffu - uint32_t(c)); }

// Sorts candidates that stand in ascending order of id: a stable radix sort by p, 11 bits a pass, needs no comparison of ids.
void sort_candidates(uint64_t* first, size_t count, std::vector<uint64_t>& spare) {
  if (count < 2048) return std::sort(first, first + count, std::greater<>());
  spare.resize(count);
  uint64_t *from = first, *to = spare.data();
  for (int shift = 32; shift < 64; shift += 11) {
    auto digit = [shift](uint64_t c) { return 2047u - (uint32_t(c >> shift) & 2047u); };  // descending
    std::array<uint32_t, 2048> starts{};
    for (size_t i = 0; i < count; ++i) ++starts[digit(from[i])];
    uint32_t sum = 0;
    for (uint32_t& start : starts) sum += std::exchange(start, sum);
    for (size_t i = 0; i < count; ++i) to[starts[digit(from[i])]++] = from[i];
    std::swap(from, to);
  }
  std::copy(from, from + count, first);  // three passes end in the spare memory
}

// The candidates in sorted order, as many as are asked for: most draws need a few of 150,000.
class Ranking {
 public:
  Ranking(const float* p, int count, SampleScratch& scratch)
      : p_(p), count_(count), kept_(scratch.kept), spare_(scratch.spare) {
    kept_.clear();
    buckets_.fill(0);
    for (int i = 0; i < count; ++i) ++buckets_[bucket(p[i])];
    floor_ = int(buckets_.size());
  }

  int count() const { return count_; }

  uint64_t operator[](size_t rank) {
    while (rank >= kept_.size()) grow();
    return kept_[rank];
  }

 private:
  // p <= 1 has at most 0x3f80 in its upper half: sign, exponent and 7 bits, in the order of p.
  static int bucket(float p) { return int(std::bit_cast<uint32_t>(p) >> 16); }

  // Adds whole buckets from the top until what is kept has at least doubled, and sorts what came.
  void grow() {
    const int ceiling = floor_;
    const size_t wanted = std::max<size_t>(256, kept_.size());
    size_t more = 0;
    while (more < wanted && floor_ > 0) more += buckets_[size_t(--floor_)];
    const size_t old = kept_.size();
    kept_.reserve(old + more);
    for (int i = 0; i < count_; ++i) {
      const int b = bucket(p_[i]);
      if (b >= floor_ && b < ceiling) kept_.push_back(candidate(p_[i], i));
    }
    sort_candidates(kept_.data() + old, kept_.size() - old, spare_);
  }

  const float* p_;
  const int count_;
  std::vector<uint64_t>&kept_, &spare_;
  int floor_;
  std::array<uint32_t, 0x3f81> buckets_;
};

double ascending_sum(const float* p, int count) {
  double sum = 0.0;
  for (int i = 0; i < count; ++i) sum += double(p[i]);
  return sum;
}

int draw(const float* p, int count, const SampleRow& row, double total, SampleScratch& scratch) {
  Ranking ranking(p, count, scratch);
  size_t end = row.top_k > 0 && row.top_k < count ? size_t(row.top_k) : size_t(count);
  if (end < size_t(count)) {
    ranking[end - 1];
    std::vector<uint64_t> first(scratch.kept.begin(), scratch.kept.begin() + std::ptrdiff_t(end));
    std::sort(first.begin(), first.end(), [](uint64_t a, uint64_t b) { return identity(a) < identity(b); });
    total = 0.0;
    for (uint64_t c : first) total += double(probability(c));
  }
  if (row.top_p < 1.0f) {
    const double wanted = double(row.top_p) * total;
    double sum = 0.0;
    for (size_t i = 0; i < end; ++i) {
      sum += double(probability(ranking[i]));
      if (sum >= wanted) end = i + 1;
    }
  }
  if (row.min_p > 0.0f) {
    const float least = row.min_p * probability(ranking[0]);
    size_t i = 0;
    while (i < end && !(probability(ranking[i]) < least)) ++i;
    end = std::max<size_t>(i, 1);
  }
  double kept_total = total;
  if (end < size_t(count)) {
    kept_total = 0.0;
    for (size_t i = 0; i < end; ++i) kept_total += double(probability(ranking[i]));
  }
  const double target = uniform(row.seed, row.position, row.choice) * kept_total;
  double sum = 0.0;
  for (size_t i = 0; i < end; ++i) {
    sum += double(probability(ranking[i]));
    if (sum > target) return identity(ranking[i]);
  }
  while (end > 1 && !(probability(ranking[end - 1]) > 0.0f)) --end;  // rounding left nothing over: the last that is possible
  return identity(ranking[end - 1]);
}

// -inf for every id whose bit is not set. What is no number stays so, and is found.
void apply_mask(const uint8_t* mask, float* logits, int count) {
  for (int i = 0; i < count; ++i)
    if (!(mask[i >> 3] >> (i & 7) & 1) && !std::isnan(logits[i])) logits[i] = -std::numeric_limits<float>::infinity();
}

// The logits to draw from: those of the model where nothing changes them, else a copy with each change rounded.
const float* adjusted(const float* logits, int count, const Adjustments& a, std::vector<float>& copy) {
  if (a.bias_count == 0 && a.seen_count == 0 && a.mask == nullptr) return logits;
  copy.assign(logits, logits + count);
  for (int64_t i = 0; i < a.bias_count; ++i) copy[size_t(a.bias_ids[i])] += a.biases[i];
  for (int64_t i = 0; i < a.seen_count; ++i) {
    float& z = copy[size_t(a.seen_ids[i])];
    z = z > 0.0f ? z / a.repetition : z * a.repetition;
    if (a.made[i] == 0) continue;
    z = z - a.frequency * float(a.made[i]);
    z = z - a.presence;
  }
  if (a.mask != nullptr) apply_mask(a.mask, copy.data(), count);
  return copy.data();
}

// The `wanted` largest logits by (logit descending, id ascending).
void top_logits(const float* logits, int count, int wanted, int32_t* ids, float* values) {
  int held = 0;
  for (int i = 0; i < count; ++i) {
    if (held == wanted && (wanted == 0 || !(logits[i] > values[held - 1]))) continue;
    int at = held < wanted ? held++ : held - 1;
    for (; at > 0 && logits[i] > values[at - 1]; --at) {
      values[at] = values[at - 1];
      ids[at] = ids[at - 1];
    }
    values[at] = logits[i];
    ids[at] = i;
  }
}

}  // namespace

void sample_row(const Isa& isa, const float* raw, int count, const SampleRow& row, const Adjustments& adjustments,
                SampleScratch& scratch, SampleResult& result) {
  const float* logits = adjusted(raw, count, adjustments, scratch.adjusted);
  result.token = -1;
  result.logprob = std::numeric_limits<float>::quiet_NaN();
  float highest = -std::numeric_limits<float>::infinity();
  for (int i = 0; i < count; ++i) {
    if (std::isnan(logits[i])) return;
    highest = std::max(highest, logits[i]);
  }
  if (std::isinf(highest)) return;
  const bool greedy = row.temperature == 0.0f;
  scratch.p.resize(size_t(count));
  float* p = scratch.p.data();
  float maximum = 0.0f;
  if (greedy) {
    int best = 0;
    for (int i = 1; i < count; ++i)
      if (logits[i] > logits[best]) best = i;
    result.token = best;
  } else {
    const double total = isa.probabilities({logits, count, row.temperature, p}, &maximum) ? ascending_sum(p, count) : 0.0;
    if (!(total > 0.0)) return;  // a temperature so small that the quotients overflow
    result.token = draw(p, count, row, total, scratch);
  }
  if (row.logprobs < 0) return;
  isa.probabilities({raw, count, 1.0f, p}, &maximum);
  const double normalizer = double(maximum) + log64(ascending_sum(p, count));
  result.logprob = float(double(raw[result.token]) - normalizer);
  const int wanted = std::min(row.logprobs, count);
  top_logits(raw, count, wanted, result.top_ids, result.top_logprobs);
  for (int i = 0; i < wanted; ++i) result.top_logprobs[i] = float(double(result.top_logprobs[i]) - normalizer);
}

}  // namespace vai
