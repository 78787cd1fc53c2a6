#include "core/row.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace vai {
namespace {

// Four lanes: what every machine of ours has.
using Floats = float __attribute__((vector_size(16)));
using Ints = int32_t __attribute__((vector_size(16)));

Floats load(const float* p) {
  Floats x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

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

}  // namespace vai
