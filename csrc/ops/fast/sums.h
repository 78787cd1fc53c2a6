// The sums of AMX's TDPBF16PS in plain C++: what all implementations of the fast kind give.
//
// A sum goes on over groups of 32 columns, ascending: e = sum of activation * weight over a group's even columns and o that
// over its odd ones are added up, each from +0 and ascending; then it becomes y + (e + o). Every product joins its sum in one
// rounding (a fused multiply-add). What would be subnormal, going in or coming out, is a zero of its sign.
#pragma once

#include <cmath>

namespace vai {
namespace {

constexpr double kSmallest = 0x1p-126;
// From here on a sum rounds to kSmallest: it lies as near to that as to the number of 24 bits below it, which is odd.
constexpr double kTiny = kSmallest * (1 - 0x1p-25);

template <class T>
T flushed(T sum, T tiny) {
  return std::fabs(sum) < tiny ? sum * T(0) : sum;
}

// One rounding, though there are two. A product of two bfloat16 has 16 bits and is exact in binary64, and so is a sum of it
// and a binary32 whose bits all lie within 53. Where they do not, one of the two is less than 2^-27 of the other, and the
// other is a binary32 itself: the sum is so close to it that no rounding leads to any other, be it done once or twice. The
// comparison with kTiny, which has 25 bits, goes the right way for the same reason. Above it the conversion rounds to 24 bits
// or, between kTiny and kSmallest, to kSmallest, as it should.
inline float fused(float sum, float a, float w) { return float(flushed(double(sum) + double(a) * double(w), kTiny)); }

// A sum of two binary32 that is below kSmallest is exact.
inline float add(float a, float b) { return flushed(a + b, float(kSmallest)); }

}  // namespace
}  // namespace vai
