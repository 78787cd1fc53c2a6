// Passes over a row as long as a vocabulary, without an element waiting for the one before it.
#pragma once

#include <cstdint>
#include <vector>

namespace vai {

constexpr int kPeakBlock = 64;

// The maximum of every 64 elements, in order; false if an element is a NaN, and then nothing is said about the maxima.
bool peaks_of(const float* x, int count, std::vector<float>& peaks);

// The places i, ascending, of all p[i] >= 0 whose bits shifted right by 16 are `high`.
void places_of(const float* p, int count, uint32_t high, std::vector<int>& places);

}  // namespace vai
