#include "core/row.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace vai {
namespace {

// Four floats or two doubles: what every machine of ours has.
using Floats = float __attribute__((vector_size(16)));
using Ints = int32_t __attribute__((vector_size(16)));
using Doubles = double __attribute__((vector_size(16)));
using Longs = int64_t __attribute__((vector_size(16)));

Floats load(const float* p) {
  Floats x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// The first two.
Doubles widened(Floats x) { return __builtin_convertvector(__builtin_shufflevector(x, x, 0, 1), Doubles); }

double plain_sum(double sum, const float* p, int count) {
  for (int i = 0; i < count; ++i) sum += double(p[i]);
  return sum;
}

// While a sum stays between two powers of two, what it grows by over some elements depends on its last bit alone: that
// decides where an element lies half-way between two neighbours. So the growth over a strip is computed for both cases
// from the lower power on, without knowing the sum yet, several strips at once.
constexpr int kStrip = 64, kPairs = 2, kStrips = 2 * kPairs, kChunk = kStrip * kStrips;

// Where the sums of the strips get to that begin at `even` and at the number after it, `odd`.
struct Ends {
  Ends(const float* p, double even, double odd) {
    Doubles from_even[kPairs], from_odd[kPairs];
    for (int k = 0; k < kPairs; ++k) {
      from_even[k] = Doubles{even, even};
      from_odd[k] = Doubles{odd, odd};
    }
    for (int i = 0; i < kStrip; i += 4)
      for (int k = 0; k < kPairs; ++k) {
        const Floats a = load(p + 2 * k * kStrip + i), b = load(p + (2 * k + 1) * kStrip + i);
        const Floats low = __builtin_shufflevector(a, b, 0, 4, 1, 5), high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
        for (const Doubles x : {widened(low), widened(__builtin_shufflevector(low, low, 2, 3, 2, 3)), widened(high),
                                widened(__builtin_shufflevector(high, high, 2, 3, 2, 3))}) {
          from_even[k] += x;
          from_odd[k] += x;
        }
      }
    for (int k = 0; k < kStrips; ++k) {
      growth[k][0] = from_even[k / 2][k % 2] - even;
      growth[k][1] = from_odd[k / 2][k % 2] - odd;
    }
  }

  double growth[kStrips][2];
};

}  // namespace

bool peaks_of(const float* x, int count, std::vector<float>& peaks) {
  const int whole = count / kPeakBlock;
  peaks.resize(size_t((count + kPeakBlock - 1) / kPeakBlock));
  Ints unordered{};
  for (int block = 0; block < whole; ++block, x += kPeakBlock) {
    Floats top[4] = {load(x), load(x + 4), load(x + 8), load(x + 12)};
    for (int j = 0; j < 4; ++j) unordered |= top[j] != top[j];
    for (int i = 16; i < kPeakBlock; i += 16)
      for (int j = 0; j < 4; ++j) {
        const Floats y = load(x + i + 4 * j);
        unordered |= y != y;
        top[j] = y > top[j] ? y : top[j];
      }
    for (int j = 0; j < 2; ++j) top[j] = top[j + 2] > top[j] ? top[j + 2] : top[j];
    top[0] = top[1] > top[0] ? top[1] : top[0];
    peaks[size_t(block)] = std::max(std::max(top[0][0], top[0][1]), std::max(top[0][2], top[0][3]));
  }
  bool sound = (unordered[0] | unordered[1] | unordered[2] | unordered[3]) == 0;
  if (whole < int(peaks.size())) {
    float top = -std::numeric_limits<float>::infinity();
    for (int i = 0; i < count - whole * kPeakBlock; ++i) {
      sound = sound && !std::isnan(x[i]);
      top = std::max(top, x[i]);
    }
    peaks.back() = top;
  }
  return sound;
}

void places_of(const float* p, int count, uint32_t high, std::vector<int>& places) {
  places.clear();
  const int32_t wanted = int32_t(high);
  const int whole = count / 16 * 16;
  for (int i = 0; i < whole; i += 16) {
    Ints found{};
    for (int j = 0; j < 16; j += 4) {
      Ints bits;
      std::memcpy(&bits, p + i + j, sizeof bits);
      found |= (bits >> 16) == wanted;
    }
    if ((found[0] | found[1] | found[2] | found[3]) == 0) continue;
    for (int j = i; j < i + 16; ++j)
      if (std::bit_cast<uint32_t>(p[j]) >> 16 == high) places.push_back(j);
  }
  for (int i = whole; i < count; ++i)
    if (std::bit_cast<uint32_t>(p[i]) >> 16 == high) places.push_back(i);
}

double ascending_sum(const float* p, int count) {
  double sum = 0.0;
  int i = 0;
  while (i + kChunk <= count) {
    const uint64_t power = std::bit_cast<uint64_t>(sum) & 0x7ff0000000000000u;
    const double even = std::bit_cast<double>(power), odd = std::bit_cast<double>(power | 1), end = 2.0 * even;
    int strip = kStrips;
    while (sum > 0.0 && strip == kStrips && i + kChunk <= count) {
      const Ends ends(p + i, even, odd);
      for (strip = 0; strip < kStrips; ++strip, i += kStrip) {
        const double after = sum + ends.growth[strip][std::bit_cast<uint64_t>(sum) & 1];
        if (!(after < end)) break;
        sum = after;
      }
    }
    const int more = std::min(kStrip, count - i);  // from zero, or over a power of two
    sum = plain_sum(sum, p + i, more);
    i += more;
  }
  return plain_sum(sum, p + i, count - i);
}

}  // namespace vai
