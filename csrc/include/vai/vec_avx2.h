// Avx2Vec: 8 lanes in a ymm register, two registers for a line. Include from *avx2.cc files only.
#pragma once

#include <immintrin.h>

#include <cstddef>

#include "vai/scalar_types.h"

// Loops over the registers of a tile: unrolled, or the registers become memory.
#define VAI_UNROLL _Pragma("GCC unroll 16")

namespace vai {
namespace {

struct Avx2Vec {
  static constexpr const char* kName = "avx2";
  static constexpr int kLanes = 8;
  static constexpr int kMaxRows = 4;
  static constexpr int kBlocks = 1;
  static constexpr int kAhead = 1728;
  static int row_block(int rows) { return rows < kMaxRows ? rows : kMaxRows; }

  using F = __m256;
  using I = __m256i;
  using Mask = __m256;

  static F set1(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F load_bf16(const void* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
  }
  static F load_f16(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F accumulate(F acc, F product) { return _mm256_add_ps(acc, product); }
  static I bits(F a) { return _mm256_castps_si256(a); }
  static F from_bits(I a) { return _mm256_castsi256_ps(a); }
  static I iset1(int32_t x) { return _mm256_set1_epi32(x); }
  static I iadd(I a, I b) { return _mm256_add_epi32(a, b); }
  static I iand(I a, I b) { return _mm256_and_si256(a, b); }
  static I imax(I a, I b) { return _mm256_max_epi32(a, b); }
  static I to_exponent(I a) { return _mm256_slli_epi32(a, 23); }
  static I to_int(F a) { return _mm256_cvtps_epi32(a); }
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static Mask greater_equal(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
  static Mask unordered(F a) { return _mm256_cmp_ps(a, a, _CMP_UNORD_Q); }
  static F select(Mask m, F yes, F no) { return _mm256_blendv_ps(no, yes, m); }
  static Mask before(int first, int end) {
    const I lane = _mm256_add_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane));
  }
  static void store_i8(int8_t* p, I a) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
  }

  static void f16_pairs(const uint8_t* p, F& even, F& odd) {
    const I split = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,  //
                                     0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    const I x = _mm256_shuffle_epi8(_mm256_loadu_si256((const I*)p), split);
    const I ordered = _mm256_permute4x64_epi64(x, 0xd8);
    even = _mm256_cvtph_ps(_mm256_castsi256_si128(ordered));
    odd = _mm256_cvtph_ps(_mm256_extracti128_si256(ordered, 1));
  }
  static void bf16_pairs(const uint8_t* p, F& even, F& odd) {
    const I x = _mm256_loadu_si256((const I*)p);
    even = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(int(0xffff0000u))));
  }

  // Without VNNI: 16-bit sums of unsigned nibbles x signed bytes; a lane holds at most 15*127*16 = 30480.
  using Dot4 = I;
  struct Nibbles { I low, high; };
  static Nibbles nibbles(const uint8_t* p) {
    const I mask = _mm256_set1_epi8(15), x = _mm256_loadu_si256((const I*)p);
    return {_mm256_and_si256(x, mask), _mm256_and_si256(_mm256_srli_epi16(x, 4), mask)};
  }
  static Dot4 dot4_begin(int32_t) { return _mm256_setzero_si256(); }
  static Dot4 dot4(Dot4 acc, const Nibbles& w, const int8_t* a) {
    acc = add_words(acc, _mm256_maddubs_epi16(w.low, _mm256_set1_epi32(load_as<int32_t>(a))));
    return add_words(acc, _mm256_maddubs_epi16(w.high, _mm256_set1_epi32(load_as<int32_t>(a + 4))));
  }
  // In place: gcc otherwise reorders the sum into a tree whose leaves do not fit the registers.
  static I add_words(I acc, I x) {
    asm("vpaddw %1, %0, %0" : "+x"(acc) : "x"(x));
    return acc;
  }
  static I dot4_end(Dot4 acc, int32_t correction) {
    return _mm256_add_epi32(_mm256_madd_epi16(acc, _mm256_set1_epi16(1)), _mm256_set1_epi32(correction));
  }

  // |w| x sign(a, w): 2*128*127 = 32512 fits 16 bits; sign(w, a) would be wrong for w = -128.
  using Dot8 = I;
  struct Bytes { I magnitude, value; };
  static Bytes bytes(const uint8_t* p) {
    const I x = _mm256_xor_si256(_mm256_loadu_si256((const I*)p), _mm256_set1_epi8(char(0x80)));
    return {_mm256_abs_epi8(x), x};
  }
  static Dot8 dot8_begin(int32_t) { return _mm256_setzero_si256(); }
  static Dot8 dot8(Dot8 acc, const Bytes& w, const int8_t* a) {
    const I pairs = _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(_mm256_set1_epi32(load_as<int32_t>(a)), w.value));
    const I sums = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    asm("vpaddd %1, %0, %0" : "+x"(acc) : "x"(sums));  // in place, as above
    return acc;
  }
  static I dot8_end(Dot8 acc) { return acc; }

  // Keeps gcc from sharing the activations' broadcasts between the halves of a line, which spills; loading is cheaper.
  static void fence() { asm volatile("" ::: "memory"); }
  static void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
};

}  // namespace
}  // namespace vai
