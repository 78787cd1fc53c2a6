// The AVX2 ceilings: eight independent chains, so that no addition waits for the one before.
#include <immintrin.h>

#include "vai/ceilings.h"

namespace vai {

// The instructions are written out: a compiler would take invariant products out of the loop, or see that nobody reads them.
uint64_t multiply_int8_avx2(int rounds) {
  const __m256i codes = _mm256_set1_epi8(3), weights = _mm256_set1_epi8(-2);
  __m256i acc[8], product;
  for (auto& a : acc) a = _mm256_setzero_si256();
  for (int i = 0; i < rounds; ++i)
#pragma GCC unroll 8
    for (auto& a : acc) {
      asm volatile("vpmaddubsw %2, %1, %0" : "=x"(product) : "x"(codes), "x"(weights));
      asm volatile("vpaddw %1, %0, %0" : "+x"(a) : "x"(product));
    }
  return uint64_t(rounds) * 8 * 32;
}

uint64_t multiply_f32_avx2(int rounds) {
  const __m256 x = _mm256_set1_ps(0.5f), w = _mm256_set1_ps(0.25f);
  __m256 acc[8], product;
  for (auto& a : acc) a = _mm256_setzero_ps();
  for (int i = 0; i < rounds; ++i)
#pragma GCC unroll 8
    for (auto& a : acc) {
      asm volatile("vmulps %2, %1, %0" : "=x"(product) : "x"(x), "x"(w));
      asm volatile("vaddps %1, %0, %0" : "+x"(a) : "x"(product));
    }
  return uint64_t(rounds) * 8 * 8;
}

// Without prefetches: where nothing is computed they take the places of the processor's own, which fetch more at once.
void read_avx2(const uint8_t* data, size_t bytes) {
  __m256i sum[8];
  for (auto& s : sum) s = _mm256_setzero_si256();
  for (size_t at = 0; at + 256 <= bytes; at += 256) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) sum[i] = _mm256_or_si256(sum[i], _mm256_loadu_si256((const __m256i*)(data + at + 32 * i)));
  }
  for (auto& s : sum) asm volatile("" ::"x"(s));
}

}  // namespace vai
