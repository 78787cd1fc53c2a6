// Avx2Vec: 8 lanes in a ymm register, two registers for a line. Include from *avx2.cc files only.
#pragma once

#include <immintrin.h>

#include <cstddef>

#include "vai/ops.h"
#include "vai/scalar_types.h"

// Loops over the registers of a tile: unrolled, or the registers become memory.
#define VAI_UNROLL _Pragma("GCC unroll 16")
#define VAI_ROLLED _Pragma("GCC unroll 1")

namespace vai {
namespace {

struct Avx2Vec {
  static constexpr const char* kName = "avx2";
  static constexpr int kLanes = 8;
  static constexpr int kMaxRows = 4;
  static constexpr int kBlocks = 1;
  static constexpr int kRegisters = 16;
  static constexpr bool kPanels = true;
  static constexpr bool kFetches = true;
  static int row_block(int rows) { return rows < kMaxRows ? rows : kMaxRows; }
  // Whether unpacking once for all rows costs less than for each row block: from the second on where a line takes nine
  // instructions, from the third where it takes five (IQ4), much later where it takes three. Halves are widened for two.
  static bool panels_pay(BlockType type, int rows) {
    switch (type) {
      case BlockType::kF16:
      case BlockType::kBF16:
      case BlockType::kF32:
      case BlockType::kQ5_K:
      case BlockType::kQ6_K: return rows > kMaxRows;
      case BlockType::kIQ4_NL:
      case BlockType::kIQ4_XS: return rows > 2 * kMaxRows;
      case BlockType::kQ4_K: return rows > 8 * kMaxRows;
      default: return false;
    }
  }

  using F = __m256;
  using I = __m256i;
  using Mask = __m256;

  static F set1(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  using Double = __m256d;
  static Double load_double(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
  static F load_bf16(const void* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
  }
  static F load_i8(const void* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
  static F load_f16(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  // 2^(e - 128), of bits that are those of e - 1 in the exponent, or where that is none a subnormal's.
  static F load_e8m0(const uint8_t* p) {
    const I e = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
    const I tiny = iadd(iset1(0x00200000), shifted<21>(iand(e, iset1(1))));
    return from_bits(imax(to_exponent(isub(e, iset1(1))), tiny));
  }
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
  static I ior(I a, I b) { return _mm256_or_si256(a, b); }
  static I isub(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I load_line(const void* p) { return _mm256_loadu_si256((const I*)p); }
  static void store_line(void* p, I a) { _mm256_storeu_si256((I*)p, a); }
  template <int n>
  static I shifted(I a) {
    return n >= 0 ? _mm256_slli_epi32(a, n) : _mm256_srli_epi32(a, -n);
  }
  static I imax(I a, I b) { return _mm256_max_epi32(a, b); }
  static I to_exponent(I a) { return _mm256_slli_epi32(a, 23); }
  static I to_int(F a) { return _mm256_cvtps_epi32(a); }
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static Mask greater_equal(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
  static Mask not_less(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_NLT_UQ); }
  static F select(Mask m, F yes, F no) { return _mm256_blendv_ps(no, yes, m); }
  static F where(Mask m, F a) { return _mm256_and_ps(m, a); }
  static void keep_in_order(F& a) { asm volatile("" : "+x"(a)); }
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
  template <int kLow, int kHigh, int kMask>
  static Nibbles join(const Nibbles& w, I above) {
    const I mask = _mm256_set1_epi8(kMask);
    return {_mm256_or_si256(w.low, _mm256_and_si256(shifted<kLow>(above), mask)),
            _mm256_or_si256(w.high, _mm256_and_si256(shifted<kHigh>(above), mask))};
  }
  using Small = I;
  static Small small(const int8_t* entries) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)entries)); }
  static Nibbles look_up(const Nibbles& w, Small table) {
    return {_mm256_shuffle_epi8(table, w.low), _mm256_shuffle_epi8(table, w.high)};
  }
  // What still fits: 31*127*8 = 31496 for a sum of 16 columns, 63*127*4 = 32004 for one of 8.
  static constexpr int dot4_columns(int bits) { return bits == 4 ? 32 : bits == 5 ? 16 : 8; }
  static constexpr bool kDot4Begins = false;
  struct NoOffset {};
  static Dot4 dot4_begin(int32_t) { return _mm256_setzero_si256(); }
  struct Activations { I low, high; };
  static Activations dot4_activations(const int8_t* a) {
    return {_mm256_set1_epi32(load_as<int32_t>(a)), _mm256_set1_epi32(load_as<int32_t>(a + 4))};
  }
  static Dot4 dot4(Dot4 acc, const Nibbles& w, const Activations& a) {
    acc = add_words(acc, _mm256_maddubs_epi16(w.low, a.low));
    return add_words(acc, _mm256_maddubs_epi16(w.high, a.high));
  }
  static Dot4 dot4(const Nibbles& w, const Activations& a) {
    return add_words(_mm256_maddubs_epi16(w.low, a.low), _mm256_maddubs_epi16(w.high, a.high));
  }
  // In place: gcc otherwise reorders the sum into a tree whose leaves do not fit the registers.
  static I add_words(I acc, I x) {
    asm("vpaddw %1, %0, %0" : "+x"(acc) : "x"(x));
    return acc;
  }

  static I dot4_end(Dot4 acc, I offset) { return _mm256_sub_epi32(_mm256_madd_epi16(acc, _mm256_set1_epi16(1)), offset); }
  static I dot4_end(Dot4 acc, NoOffset) { return _mm256_madd_epi16(acc, _mm256_set1_epi16(1)); }
  template <int kZero>
  static auto dot4_offset(const int32_t* sum) {
    if constexpr (kZero == 0)
      return NoOffset{};
    else
      return _mm256_slli_epi32(_mm256_set1_epi32(load_as<int32_t>(sum)), __builtin_ctz(kZero));
  }

  static I dot4_times(I total, Dot4 dot, I factor) { return add_dwords(total, _mm256_madd_epi16(dot, factor)); }
  static I factor(const int8_t* p) { return pairs(p, p); }
  static I pairs(const int8_t* even, const int8_t* odd) {
    const __m128i e = _mm_loadl_epi64((const __m128i*)even), o = _mm_loadl_epi64((const __m128i*)odd);
    return _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(e, o));
  }
  static I dot_pairs(I total, I pairs, int32_t sums) {
    return add_dwords(total, _mm256_madd_epi16(pairs, _mm256_set1_epi32(sums)));
  }
  static I add_dwords(I acc, I x) {
    asm("vpaddd %1, %0, %0" : "+x"(acc) : "x"(x));
    return acc;
  }

  // |w| x sign(a, w): 2*128*127 = 32512 fits 16 bits; sign(w, a) would be wrong for w = -128.
  using Dot8 = I;
  struct Bytes { I magnitude, value; };
  static Bytes bytes(const uint8_t* p) {
    const I x = _mm256_xor_si256(_mm256_loadu_si256((const I*)p), _mm256_set1_epi8(char(0x80)));
    return {_mm256_abs_epi8(x), x};
  }
  static Dot8 dot8_begin(int32_t) { return _mm256_setzero_si256(); }
  static I dot8_activations(const int8_t* a) { return _mm256_set1_epi32(load_as<int32_t>(a)); }
  static Dot8 dot8(Dot8 acc, const Bytes& w, I a) {
    const I pairs = _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(a, w.value));
    const I sums = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    return add_dwords(acc, sums);
  }
  static I dot8_end(Dot8 acc) { return acc; }

  // Of lines that are unpacked, four columns each.
  static I magnitude(I a) { return _mm256_abs_epi8(a); }
  static I products(I w, I a) { return _mm256_maddubs_epi16(w, a); }
  static I signed_products(I magnitude, I value, I a) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(a, value)), _mm256_set1_epi16(1));
  }

  // |a| x sign(w, a): 2*127*127 = 32258 fits 16 bits once, so each product is widened; w is never -128.
  static constexpr int kWideZero = 0;
  using Wide = I;
  static Wide wide(const int8_t* entries) { return small(entries); }
  static Nibbles look_up_wide(const Nibbles& w, Wide table) { return look_up(w, table); }
  static Activations wide_activations(const int8_t* a) { return dot4_activations(a); }
  static I dot_wide(I acc, const Nibbles& w, const Activations& a) {
    return one_wide(one_wide(acc, w.low, a.low), w.high, a.high);
  }
  static I one_wide(I acc, I w, I a) {
    const I pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(w, a));
    return add_dwords(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static I wide_factor(const int8_t* p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
  static I wide_times(I total, I dot, I factor) { return add_dwords(total, _mm256_mullo_epi32(dot, factor)); }

  // Keeps gcc from hoisting the scale products over the integer part, which spills.
  static void fence() { asm volatile("" ::: "memory"); }
  // Inlined always: gcc 12 takes a function that only prefetches for one without effects, and leaves its calls out.
  static inline __attribute__((always_inline)) void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
};

}  // namespace
}  // namespace vai
