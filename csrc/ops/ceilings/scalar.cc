// The portable ceilings: what the compiler makes of plain loops, which is what the scalar kernels are.
#include "vai/ceilings.h"

namespace vai {
namespace {

constexpr int kLanes = 128;

template <class Sum, class Value>
uint64_t multiply(int rounds) {
  Sum acc[kLanes] = {};
  Value x[kLanes], w[kLanes];
  for (int i = 0; i < kLanes; ++i) x[i] = Value(1), w[i] = Value(i % 3);
  for (int round = 0; round < rounds; ++round) {
    asm volatile("" ::"r"(x), "r"(w), "r"(acc) : "memory");  // every round counts
    for (int i = 0; i < kLanes; ++i) acc[i] += Sum(x[i]) * Sum(w[i]);
  }
  asm volatile("" ::"r"(acc) : "memory");
  return uint64_t(rounds) * kLanes;
}

}  // namespace

uint64_t multiply_int8_scalar(int rounds) { return multiply<int32_t, int8_t>(rounds); }
uint64_t multiply_f32_scalar(int rounds) { return multiply<float, float>(rounds); }

void read_scalar(const uint8_t* data, size_t bytes) {
  const uint64_t* words = reinterpret_cast<const uint64_t*>(data);
  uint64_t any = 0;
  for (size_t i = 0; i < bytes / sizeof(uint64_t); ++i) any |= words[i];
  asm volatile("" ::"r"(any));
}

}  // namespace vai
