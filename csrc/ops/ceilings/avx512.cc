// The AVX-512-VNNI ceilings: twelve independent chains, so that no addition waits for the one before.
#include <immintrin.h>

#include "vai/ceilings.h"

namespace vai {

constexpr int kChains = 12;

// The instructions are written out: a compiler would take invariant products out of the loop, or see that nobody reads them.
uint64_t multiply_int8_avx512(int rounds) {
  const __m512i codes = _mm512_set1_epi8(3), weights = _mm512_set1_epi8(-2);
  __m512i acc[kChains];
  for (auto& a : acc) a = _mm512_setzero_si512();
  for (int i = 0; i < rounds; ++i)
#pragma GCC unroll 12
    for (auto& a : acc) asm volatile("vpdpbusd %2, %1, %0" : "+v"(a) : "v"(codes), "v"(weights));
  return uint64_t(rounds) * kChains * 64;
}

uint64_t multiply_f32_avx512(int rounds) {
  const __m512 x = _mm512_set1_ps(0.5f), w = _mm512_set1_ps(0.25f);
  __m512 acc[kChains], product;
  for (auto& a : acc) a = _mm512_setzero_ps();
  for (int i = 0; i < rounds; ++i)
#pragma GCC unroll 12
    for (auto& a : acc) {
      asm volatile("vmulps %2, %1, %0" : "=v"(product) : "v"(x), "v"(w));
      asm volatile("vaddps %1, %0, %0" : "+v"(a) : "v"(product));
    }
  return uint64_t(rounds) * kChains * 16;
}

constexpr size_t kReadAhead = 4096;  // bytes of prefetch, as far as the kernels reach at one row

void read_avx512(const uint8_t* data, size_t bytes) {
  __m512i sum[8];
  for (auto& s : sum) s = _mm512_setzero_si512();
  for (size_t at = 0; at + 512 <= bytes; at += 512) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      _mm_prefetch((const char*)data + at + kReadAhead + 64 * i, _MM_HINT_T0);
      sum[i] = _mm512_or_si512(sum[i], _mm512_loadu_si512(data + at + 64 * i));
    }
  }
  for (auto& s : sum) asm volatile("" ::"v"(s));
}

}  // namespace vai
