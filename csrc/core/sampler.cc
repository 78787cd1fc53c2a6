#include "core/sampler.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <utility>

#include "core/row.h"

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

// One row on its way to a token: its logits, their highest, and what is computed of it when somebody asks.
class Row {
 public:
  Row(const Isa& isa, const float* logits, int count, float temperature, float highest, SampleScratch& scratch)
      : isa_(isa), logits_(logits), count_(count), temperature_(temperature), highest_(highest), scratch_(scratch) {}

  int count() const { return count_; }
  const float* logits() const { return logits_; }
  float temperature() const { return temperature_; }

  // p of every id.
  const float* probabilities() {
    if (total_ < 0.0) {
      if (scratch_.p_count < size_t(count_)) {
        scratch_.p = std::make_unique_for_overwrite<float[]>(size_t(count_));
        scratch_.p_count = size_t(count_);
      }
      total_ = isa_.probabilities({logits_, count_, temperature_, highest_, scratch_.p.get()});
    }
    return scratch_.p.get();
  }

  double total() {
    probabilities();
    return total_;
  }

  // The ids with the highest p, at least `wanted` of them unless there are fewer, in sorted order: found by the peaks of
  // `scratch.peaks`, and p computed for few others. Nothing where too many are alike.
  bool best(size_t wanted, std::vector<uint64_t>& sorted) {
    std::vector<float>&peaks = scratch_.peaks, &floors = scratch_.floors;
    if (wanted > peaks.size()) return false;
    floors = peaks;
    std::nth_element(floors.begin(), floors.begin() + std::ptrdiff_t(wanted - 1), floors.end(), std::greater<>());
    const float floor = floors[wanted - 1];  // as many elements are at least this high
    if (std::isinf(floor / temperature_)) return false;
    const float below = margin(floor);
    std::vector<float>& near = scratch_.near;
    std::vector<int>& ids = scratch_.near_ids;
    near.clear();
    ids.clear();
    for (size_t block = 0; block < peaks.size(); ++block) {
      if (peaks[block] < below) continue;
      const int begin = int(block) * kPeakBlock, end = std::min(begin + kPeakBlock, count_);
      for (int i = begin; i < end; ++i)
        if (logits_[i] >= below) {
          near.push_back(logits_[i]);
          ids.push_back(i);
        }
      if (near.size() > size_t(count_) / 8) return false;
    }
    scratch_.near_p.resize(near.size());
    float* p = scratch_.near_p.data();
    isa_.probabilities({near.data(), int(near.size()), temperature_, highest_, p});
    float least = 1.0f;
    for (size_t i = 0; i < near.size(); ++i)
      if (near[i] >= floor) least = std::min(least, p[i]);
    sorted.clear();
    for (size_t i = 0; i < near.size(); ++i)
      if (p[i] >= least) sorted.push_back(candidate(p[i], ids[i]));
    sort_candidates(sorted.data(), sorted.size(), scratch_.spare);
    return true;
  }

 private:
  // A logit so far below `floor` that everything below it has a smaller p, or none at all: two logits that differ in the
  // last bits may have their p the other way round, because exp is not exact.
  float margin(float floor) const {
    const float highest = highest_ / temperature_, at = floor / temperature_ - highest;
    float step = std::max(1e-4f * temperature_, std::abs(floor) * 1e-6f), below = floor - step;
    while (!(below / temperature_ - highest < at - 1e-5f)) {
      step *= 2.0f;
      below = floor - step;
    }
    return below;
  }

  const Isa& isa_;
  const float* logits_;
  const int count_;
  const float temperature_, highest_;
  SampleScratch& scratch_;
  double total_ = -1.0;  // before it is computed
};

// The candidates in sorted order, as many as are asked for: most draws need a few of 150,000.
class Ranking {
 public:
  Ranking(Row& row, size_t wanted, SampleScratch& scratch) : row_(row), kept_(scratch.kept), spare_(scratch.spare) {
    if (!row.best(wanted, kept_)) kept_.clear();
  }

  uint64_t operator[](size_t rank) {
    while (rank >= kept_.size()) grow();
    return kept_[rank];
  }

  // The sum of those that will be asked for, about: so they are found at once.
  void expect(double mass) { expected_ = mass; }

  // The first ones, so many.
  std::vector<uint64_t> first(size_t count) {
    if (count > 0) (*this)[count - 1];
    return {kept_.begin(), kept_.begin() + std::ptrdiff_t(count)};
  }

 private:
  // p <= 1 has at most 0x3f80 in its upper half: sign, exponent and 7 bits, in the order of p.
  static int bucket(float p) { return int(std::bit_cast<uint32_t>(p) >> 16); }

  // Adds whole buckets from the top until what is kept has at least tripled and adds up to what is expected, and sorts
  // what came.
  void grow() {
    const float* p = row_.probabilities();
    const int count = row_.count();
    const size_t wanted = std::max<size_t>(1024, 2 * kept_.size());
    if (floor_ < 0) {  // from the beginning: what the peaks gave is the beginning of the same order
      buckets_.assign(0x3f81, 0);
      for (int i = 0; i < count; ++i) ++buckets_[size_t(bucket(p[i]))];
      floor_ = int(buckets_.size());
      kept_.clear();
    }
    const int ceiling = floor_;
    size_t more = 0;
    while ((more < wanted || mass_ < expected_) && floor_ > 0) {
      const uint32_t here = buckets_[size_t(--floor_)];
      more += here;
      mass_ += double(here) * double(std::bit_cast<float>(uint32_t(floor_) << 16));  // at least
    }
    const size_t old = kept_.size();
    kept_.resize(old + more + 1);  // one more is written, and not kept
    uint64_t* next = kept_.data() + old;
    for (int i = 0; i < count; ++i) {
      const int b = bucket(p[i]);
      *next = candidate(p[i], i);
      next += (b >= floor_) & (b < ceiling);
    }
    kept_.pop_back();
    sort_candidates(kept_.data() + old, more, spare_);
  }

  Row& row_;
  std::vector<uint64_t>&kept_, &spare_;
  int floor_ = -1;
  double mass_ = 0.0, expected_ = 0.0;
  std::vector<uint32_t> buckets_;
};

// How many are ranked at first where no top_k says how many it takes, and how many when a quarter of the mass is among those.
constexpr size_t kFirst = 128, kMore = 1024;

// Running sums over the candidates in sorted order, without sorting them: what binary64 adds without rounding may be added
// in any order. Candidates are in buckets by the upper half of p. All p from 2^-j on are multiples of 2^-(j+23), so sums
// of them below 2^(30-j) are exact; where that does not hold, nothing is found.
class RunningSums {
 public:
  RunningSums(Row& row, SampleScratch& scratch) : row_(row), scratch_(scratch) {}

  // The first candidate at which the sum is at least `mass`, or `more` than it: its id, and the sum with it.
  bool find(double mass, bool more, int& id, double& sum) {
    auto reached = [&](double s) { return more ? s > mass : s >= mass; };
    auto among = [&](const std::vector<uint64_t>& first) {
      sum = 0.0;
      for (uint64_t c : first) {
        sum += double(probability(c));
        if (reached(sum)) return id = identity(c), true;
      }
      return false;
    };
    if (among(list()) || (sum > 0.25 * mass && list().size() < kMore && among(list(kMore)))) return true;
    if (!counted_) add_up();
    sum = 0.0;
    for (int bucket = kBuckets - 1; bucket > 0; --bucket) {
      const double after = sum + scratch_.masses[size_t(bucket)];
      if (!(after < exact_below(bucket))) return false;
      if (reached(after)) return find_in(bucket, reached, id, sum);
      sum = after;
    }
    return false;
  }

  // The sum of all p that are at least `least`.
  bool down_to(float least, double& sum) {
    sum = 0.0;
    for (uint64_t c : list()) {
      if (probability(c) < least) return true;
      sum += double(probability(c));
    }
    const int last = int(std::bit_cast<uint32_t>(least) >> 16) - kLowest;
    if (last <= 0) return false;
    if (!counted_) add_up();
    sum = 0.0;
    for (int bucket = kBuckets - 1; bucket > last; --bucket) sum += scratch_.masses[size_t(bucket)];
    places_of(row_.probabilities(), row_.count(), uint32_t(last + kLowest), scratch_.near_ids);
    for (int i : scratch_.near_ids)
      if (const float p = row_.probabilities()[i]; p >= least) sum += double(p);
    return sum < exact_below(last);
  }

 private:
  // The first ones, where these can be found alone.
  const std::vector<uint64_t>& list(size_t wanted = kFirst) {
    if (listed_ < wanted && !row_.best(wanted, scratch_.kept)) scratch_.kept.clear();
    listed_ = std::max(listed_, wanted);
    return scratch_.kept;
  }

  // From 2^-20 to 1, 128 for each power; what is less is in the first.
  static constexpr int kPowers = 20, kLowest = (127 - kPowers) << 7, kBuckets = (127 << 7) - kLowest + 1;

  static double exact_below(int bucket) { return std::ldexp(1.0, 30 - kPowers + (bucket >> 7)); }

  void add_up() {
    counted_ = true;
    scratch_.masses.assign(kBuckets, 0.0);
    const float* p = row_.probabilities();
    double* masses = scratch_.masses.data();
    for (int i = 0; i < row_.count(); ++i) {
      const int bucket = int(std::bit_cast<uint32_t>(p[i]) >> 16) - kLowest;
      masses[bucket > 0 ? bucket : 0] += double(p[i]);
    }
  }

  template <class Reached>
  bool find_in(int bucket, Reached reached, int& id, double& sum) {
    const float* p = row_.probabilities();
    places_of(p, row_.count(), uint32_t(bucket + kLowest), scratch_.near_ids);
    std::vector<uint64_t>& own = scratch_.near_mass;
    own.clear();
    for (int i : scratch_.near_ids) own.push_back(candidate(p[i], i));
    sort_candidates(own.data(), own.size(), scratch_.spare);
    for (uint64_t c : own) {
      sum += double(probability(c));
      if (reached(sum)) return id = identity(c), true;
    }
    return false;
  }

  Row& row_;
  SampleScratch& scratch_;
  size_t listed_ = 0;  // as many were asked for
  bool counted_ = false;
};

// A draw without top_k; -1 where it takes the candidates in sorted order.
int draw_by_sums(Row& row, const SampleRow& how, SampleScratch& scratch) {
  RunningSums sums(row, scratch);
  int id;
  double kept_total = 0.0, sum;
  if (how.top_p < 1.0f || !(how.min_p > 0.0f)) kept_total = row.total();
  if (how.top_p < 1.0f && !sums.find(double(how.top_p) * kept_total, false, id, kept_total)) return -1;
  if (how.min_p > 0.0f) {  // of the highest p, which is 1
    if (!sums.down_to(how.min_p, sum)) return -1;
    kept_total = how.top_p < 1.0f ? std::min(kept_total, sum) : sum;
  }
  const double target = uniform(how.seed, how.position, how.choice) * kept_total;
  return target < kept_total && sums.find(target, true, id, sum) ? id : -1;
}

int draw(Row& row, const SampleRow& how, SampleScratch& scratch) {
  const size_t count = size_t(row.count());
  const bool cut = how.top_k > 0 && size_t(how.top_k) < count;
  if (!cut)
    if (const int id = draw_by_sums(row, how, scratch); id >= 0) return id;
  size_t end = cut ? size_t(how.top_k) : count;
  Ranking ranking(row, cut ? end : kFirst, scratch);
  double total = 0.0;
  if (cut) {
    std::vector<uint64_t> first = ranking.first(end);
    std::sort(first.begin(), first.end(), [](uint64_t a, uint64_t b) { return identity(a) < identity(b); });
    for (uint64_t c : first) total += double(probability(c));
  }
  if (how.top_p < 1.0f) {
    if (!cut) total = row.total();
    const double wanted = double(how.top_p) * total;
    ranking.expect(wanted);
    double sum = 0.0;
    for (size_t i = 0; i < end; ++i) {
      sum += double(probability(ranking[i]));
      if (sum >= wanted) end = i + 1;
    }
  }
  if (how.min_p > 0.0f) {
    const float least = how.min_p * probability(ranking[0]);
    size_t i = 0;
    while (i < end && !(probability(ranking[i]) < least)) ++i;
    end = std::max<size_t>(i, 1);
  }
  double kept_total = 0.0;
  if (end == count) kept_total = row.total();
  else
    for (size_t i = 0; i < end; ++i) kept_total += double(probability(ranking[i]));
  const double target = uniform(how.seed, how.position, how.choice) * kept_total;
  ranking.expect(target);
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
  using Floats = float __attribute__((vector_size(16)));
  using Ints = int32_t __attribute__((vector_size(16)));
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  const Ints places[2] = {{1, 2, 4, 8}, {16, 32, 64, 128}};
  int i = 0;
  for (; i + 8 <= count; i += 8) {
    const int32_t bits = mask[i >> 3];
    if (bits == 0xff) continue;
    for (int half = 0; half < 2; ++half) {
      Floats z;
      std::memcpy(&z, logits + i + 4 * half, sizeof z);
      const Ints kept = ((places[half] & bits) != 0) | (z != z);
      z = kept ? z : Floats{kNever, kNever, kNever, kNever};
      std::memcpy(logits + i + 4 * half, &z, sizeof z);
    }
  }
  for (; i < count; ++i)
    if (!(mask[i >> 3] >> (i & 7) & 1) && !std::isnan(logits[i])) logits[i] = kNever;
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
void top_logits(const float* logits, int count, const std::vector<float>& peaks, int wanted, int32_t* ids, float* values) {
  int held = 0;
  for (size_t block = 0; wanted > 0 && block < peaks.size(); ++block) {
    if (held == wanted && !(peaks[block] > values[held - 1])) continue;
    const int begin = int(block) * kPeakBlock, end = std::min(begin + kPeakBlock, count);
    for (int i = begin; i < end; ++i) {
      if (held == wanted && !(logits[i] > values[held - 1])) continue;
      int at = held < wanted ? held++ : held - 1;
      for (; at > 0 && logits[i] > values[at - 1]; --at) {
        values[at] = values[at - 1];
        ids[at] = ids[at - 1];
      }
      values[at] = logits[i];
      ids[at] = i;
    }
  }
}

// The first of the highest logits.
int best_id(const float* logits, const std::vector<float>& peaks, float highest) {
  const auto block = std::find(peaks.begin(), peaks.end(), highest);
  const float* at = logits + (block - peaks.begin()) * kPeakBlock;
  while (*at != highest) ++at;
  return int(at - logits);
}

}  // namespace

void sample_row(const Isa& isa, const float* raw, int count, const SampleRow& how, const Adjustments& adjustments,
                SampleScratch& scratch, SampleResult& result) {
  const float* logits = adjusted(raw, count, adjustments, scratch.adjusted);
  result.token = -1;
  result.logprob = std::numeric_limits<float>::quiet_NaN();
  if (!peaks_of(logits, count, scratch.peaks)) return;
  const float highest = *std::max_element(scratch.peaks.begin(), scratch.peaks.end());
  if (std::isinf(highest)) return;
  Row row(isa, logits, count, how.temperature, highest, scratch);
  if (how.temperature == 0.0f) {
    result.token = best_id(logits, scratch.peaks, highest);
  } else {
    if (std::isinf(highest / how.temperature)) return;  // a temperature so small that the quotients overflow
    result.token = draw(row, how, scratch);
  }
  if (how.logprobs < 0) return;
  if (logits != raw) peaks_of(raw, count, scratch.peaks);
  const float top = *std::max_element(scratch.peaks.begin(), scratch.peaks.end());
  Row whole(isa, raw, count, 1.0f, top, scratch);
  const bool same = logits == raw && how.temperature == 1.0f;
  const double normalizer = double(top) + log64(same ? row.total() : whole.total());
  result.logprob = float(double(raw[result.token]) - normalizer);
  const int wanted = std::min(how.logprobs, count);
  top_logits(raw, count, scratch.peaks, wanted, result.top_ids, result.top_logprobs);
  for (int i = 0; i < wanted; ++i) result.top_logprobs[i] = float(double(result.top_logprobs[i]) - normalizer);
}

}  // namespace vai
