// Avx512Vec: 16 lanes in a zmm register, dot products by VNNI. Include from *avx512.cc files only.
#pragma once

#include <immintrin.h>

#include <cstddef>

#include "vai/scalar_types.h"

// Loops over the registers of a tile: unrolled, or the registers become memory.
#ifdef __AVX512F__
#define VAI_UNROLL _Pragma("GCC unroll 16")
#else  // emulated: they are memory
#define VAI_UNROLL
#endif
#define VAI_ROLLED _Pragma("GCC unroll 1")

namespace vai {
namespace {

struct Avx512Vec {
  static constexpr const char* kName = "avx512";
  static constexpr int kLanes = 16;
  static constexpr int kMaxRows = 8;
  static constexpr int kBlocks = 2;
  static constexpr int kRegisters = 32;
  static constexpr bool kPanels = false;
  static constexpr bool kFetches = true;
  // Up to 16 rows are bound by memory: as many rows as possible for each line. Beyond, 6 rows x 2 n-blocks fill the ports.
  static constexpr int row_block(int rows) { return rows < 8 ? rows : rows <= 16 ? 8 : 6; }

  using F = __m512;
  using I = __m512i;
  using Mask = __mmask16;

  static F set1(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  using Double = __m512d;
  static Double load_double(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
  static F load_bf16(const void* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
  }
  static F load_i8(const void* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
  static F load_f16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  // 2^(e - 128), of bits that are those of e - 1 in the exponent, or where that is none a subnormal's.
  static F load_e8m0(const uint8_t* p) {
    const I e = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
    const I tiny = iadd(iset1(0x00200000), shifted<21>(iand(e, iset1(1))));
    return from_bits(imax(to_exponent(isub(e, iset1(1))), tiny));
  }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // In place: gcc 12 otherwise rotates the accumulators through registers and spills them.
  static F accumulate(F acc, F product) {
#ifdef __AVX512F__
    asm("vaddps %1, %0, %0" : "+v"(acc) : "v"(product));
    return acc;
#else  // emulated
    return add(acc, product);
#endif
  }
  static I bits(F a) { return _mm512_castps_si512(a); }
  static F from_bits(I a) { return _mm512_castsi512_ps(a); }
  static I iset1(int32_t x) { return _mm512_set1_epi32(x); }
  static I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
  static I iand(I a, I b) { return _mm512_and_si512(a, b); }
  static I ior(I a, I b) { return _mm512_or_si512(a, b); }
  static I isub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I load_line(const void* p) { return _mm512_loadu_si512(p); }
  static void store_line(void* p, I a) { _mm512_storeu_si512(p, a); }
  template <int n>
  static I shifted(I a) {
    if constexpr (n >= 0) return _mm512_slli_epi32(a, n);
    return _mm512_srli_epi32(a, n < 0 ? -n : 0);
  }
  static I imax(I a, I b) { return _mm512_max_epi32(a, b); }
  static I to_exponent(I a) { return _mm512_slli_epi32(a, 23); }
  static I to_int(F a) { return _mm512_cvtps_epi32(a); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static Mask greater_equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static Mask not_less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
  static F select(Mask m, F yes, F no) { return _mm512_mask_mov_ps(no, m, yes); }
  static F where(Mask m, F a) { return select(m, a, set1(0.0f)); }
  static void keep_in_order([[maybe_unused]] F& a) {
#ifdef __AVX512F__
    asm volatile("" : "+v"(a));
#endif
  }
  static void store_i8(int8_t* p, I a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a)); }

  static void f16_pairs(const uint8_t* p, F& even, F& odd) {
    alignas(64) static constexpr uint16_t kApart[32] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                        1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
    const I x = _mm512_permutexvar_epi16(_mm512_loadu_si512(kApart), _mm512_loadu_si512(p));
    even = _mm512_cvtph_ps(_mm512_castsi512_si256(x));
    odd = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(x, 1));
  }
  static void bf16_pairs(const uint8_t* p, F& even, F& odd) {
    const I x = _mm512_loadu_si512(p);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000u))));
  }

  using Dot4 = I;
  struct Nibbles { I low, high; };
  static Nibbles nibbles(const uint8_t* p) {
    const I mask = _mm512_set1_epi8(15), x = _mm512_loadu_si512(p);
    return {_mm512_and_si512(x, mask), _mm512_and_si512(_mm512_srli_epi16(x, 4), mask)};
  }
  template <int kLow, int kHigh, int kMask>
  static Nibbles join(const Nibbles& w, I above) {  // the ternary function is a | (b & c)
    const I mask = _mm512_set1_epi8(kMask);
    return {_mm512_ternarylogic_epi32(w.low, shifted<kLow>(above), mask, 0xf8),
            _mm512_ternarylogic_epi32(w.high, shifted<kHigh>(above), mask, 0xf8)};
  }
  using Small = I;
  static Small small(const int8_t* entries) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)entries)); }
  static Nibbles look_up(const Nibbles& w, Small table) {
    return {_mm512_shuffle_epi8(table, w.low), _mm512_shuffle_epi8(table, w.high)};
  }
  static constexpr int dot4_columns(int) { return 32; }
  static Dot4 dot4_begin(int32_t correction) { return _mm512_set1_epi32(correction); }
  struct Activations { I low, high; };
  static Activations dot4_activations(const int8_t* a) {
    return {_mm512_set1_epi32(load_as<int32_t>(a)), _mm512_set1_epi32(load_as<int32_t>(a + 4))};
  }
  static constexpr bool kDot4Begins = true;
  static Dot4 dot4(Dot4 acc, const Nibbles& w, const Activations& a) {
    return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(acc, w.low, a.low), w.high, a.high);
  }
  static Dot4 dot4(const Nibbles& w, const Activations& a) { return dot4(dot4_begin(0), w, a); }
  struct Offset {};
  template <int kZero>
  static Offset dot4_offset(const int32_t*) { return {}; }
  static I dot4_end(Dot4 acc, Offset) { return acc; }
  static I dot4_times(I total, Dot4 dot, I factor) { return _mm512_add_epi32(total, _mm512_mullo_epi32(dot, factor)); }
  static I factor(const int8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
  static I pairs(const int8_t* even, const int8_t* odd) {
    const __m128i e = _mm_loadu_si128((const __m128i*)even), o = _mm_loadu_si128((const __m128i*)odd);
    return _mm512_cvtepi8_epi16(_mm256_set_m128i(_mm_unpackhi_epi8(e, o), _mm_unpacklo_epi8(e, o)));
  }
  static I dot_pairs(I total, I pairs, int32_t sums) { return _mm512_dpwssd_epi32(total, pairs, _mm512_set1_epi32(sums)); }

  using Dot8 = I;
  using Bytes = I;
  static Bytes bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static Dot8 dot8_begin(int32_t correction) { return _mm512_set1_epi32(correction); }
  static I dot8_activations(const int8_t* a) { return _mm512_set1_epi32(load_as<int32_t>(a)); }
  static Dot8 dot8(Dot8 acc, Bytes w, I a) { return _mm512_dpbusd_epi32(acc, w, a); }
  static I dot8_end(Dot8 acc) { return acc; }

  static constexpr int kWideZero = 128;
  using Wide = I;
  static Wide wide(const int8_t* entries) { return _mm512_xor_si512(small(entries), _mm512_set1_epi8(char(0x80))); }
  static Nibbles look_up_wide(const Nibbles& w, Wide table) { return look_up(w, table); }
  static Activations wide_activations(const int8_t* a) { return dot4_activations(a); }
  static I dot_wide(I acc, const Nibbles& w, const Activations& a) { return dot4(acc, w, a); }
  static I wide_factor(const int8_t* p) { return factor(p); }
  static I wide_times(I total, I dot, I factor) { return dot4_times(total, dot, factor); }

  // Keeps gcc from hoisting the scale products over the integer part, which spills.
  static void fence() { asm volatile("" ::: "memory"); }
  // Inlined always: gcc 12 takes a function that only prefetches for one without effects, and leaves its calls out.
  static inline __attribute__((always_inline)) void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
};

}  // namespace
}  // namespace vai
