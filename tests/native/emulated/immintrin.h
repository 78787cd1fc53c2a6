// What the AVX-512 and AMX translation units use of <immintrin.h>, in plain C++ for any x86-64 processor: found before the
// compiler's own where tests build those units to run them without the instructions (CMakeLists.txt: VAI_EMULATED).
//
// Written from the operation that Intel's Software Developer's Manual (volume 2) gives for each instruction, not from the
// kernels that it is to judge. The state of MXCSR is the usual one: nearest, half to even, subnormal numbers kept.
#pragma once

#include <array>
#include <bit>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

typedef float __m512 __attribute__((vector_size(64), may_alias));
typedef double __m512d __attribute__((vector_size(64), may_alias));
typedef long long __m512i __attribute__((vector_size(64), may_alias));
typedef float __m256 __attribute__((vector_size(32), may_alias));
typedef long long __m256i __attribute__((vector_size(32), may_alias));
typedef long long __m128i __attribute__((vector_size(16), may_alias));
typedef short __m512bh __attribute__((vector_size(64), may_alias));
typedef short __m256bh __attribute__((vector_size(32), may_alias));
typedef uint16_t __mmask16;

enum { _MM_FROUND_TO_NEAREST_INT = 0, _MM_FROUND_NO_EXC = 8 };
enum { _CMP_NLT_UQ = 0x15, _CMP_GE_OQ = 0x1d };
enum { _MM_HINT_T1 = 2, _MM_HINT_T0 = 3 };

#define EMULATED inline __attribute__((noinline))
#define INLINED inline __attribute__((always_inline))

namespace emulated {

template <class T, size_t kBytes>
using Vector __attribute__((vector_size(kBytes))) = T;
using I8 = Vector<int8_t, 64>;
using I16 = Vector<int16_t, 64>;
using I32 = Vector<int32_t, 64>;
using U16 = Vector<uint16_t, 64>;
using U32 = Vector<uint32_t, 64>;  // sums and products wrap around

[[noreturn]] inline void refuse(const char* what) {
  std::fprintf(stderr, "not emulated: %s\n", what);
  std::abort();
}

template <class V>
INLINED V loaded(const void* p) {
  V value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

template <class V>
INLINED void stored(void* p, V value) { std::memcpy(p, &value, sizeof value); }

// The elements of a vector as numbers of type T.
template <class T, class V>
INLINED std::array<T, sizeof(V) / sizeof(T)> lanes(V vector) { return std::bit_cast<std::array<T, sizeof(V) / sizeof(T)>>(vector); }

// The vector whose element i, of type T, is of(i).
template <class V, class T, class Of>
INLINED V each(Of of) {
  std::array<T, sizeof(V) / sizeof(T)> made;
  for (size_t i = 0; i < made.size(); ++i) made[i] = of(i);
  return std::bit_cast<V>(made);
}

template <class Holds>
INLINED __mmask16 mask_of(Holds holds) {
  unsigned mask = 0;
  for (unsigned i = 0; i < 16; ++i) mask |= unsigned(bool(holds(i))) << i;
  return __mmask16(mask);
}

// VCVTPH2PS: exact; a signaling NaN becomes quiet.
INLINED float from_half(uint16_t half) {
  const uint32_t sign = uint32_t(half >> 15) << 31, exponent = half >> 10 & 31, fraction = half & 1023;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (fraction ? 0x00400000u : 0u) | fraction << 13);
  // fraction * 2^-24 where the exponent is 0, else (1024 + fraction) * 2^(exponent - 25)
  const float unit = std::bit_cast<float>((exponent == 0 ? 127u - 24u : exponent + 127u - 25u) << 23);
  const float size = float(exponent == 0 ? fraction : fraction + 1024u) * unit;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(size) | sign);
}

// convert_fp32_to_bfloat16 of VCVTNE2PS2BF16: subnormal numbers are zeros, whatever MXCSR says.
INLINED uint16_t to_bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  switch (std::fpclassify(x)) {
    case FP_ZERO:
    case FP_SUBNORMAL: return uint16_t(bits >> 16 & 0x8000);
    case FP_INFINITE: return uint16_t(bits >> 16);
    case FP_NAN: return uint16_t(bits >> 16 | 1u << 6);
    default: return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

// VCVTPS2DQ: what no int32 can say, and NaN, is the smallest one.
INLINED int32_t to_int(float x) { return x >= -0x1p31f && x < 0x1p31f ? int32_t(std::nearbyint(x)) : INT32_MIN; }

}  // namespace emulated

// ---- loads, stores, constants

INLINED void _mm_prefetch(const void*, int) {}
EMULATED __m128i _mm_loadu_si128(const __m128i* p) { return emulated::loaded<__m128i>(p); }
EMULATED void _mm256_storeu_si256(__m256i* p, const __m256i& a) { emulated::stored(p, a); }
EMULATED __m256i _mm256_loadu_si256(const __m256i* p) { return emulated::loaded<__m256i>(p); }
EMULATED __m256 _mm256_loadu_ps(const float* p) { return emulated::loaded<__m256>(p); }
EMULATED __m512i _mm512_loadu_si512(const void* p) { return emulated::loaded<__m512i>(p); }
EMULATED __m512 _mm512_loadu_ps(const void* p) { return emulated::loaded<__m512>(p); }
EMULATED void _mm_storeu_si128(__m128i* p, const __m128i& a) { emulated::stored(p, a); }
EMULATED void _mm512_storeu_si512(void* p, const __m512i& a) { emulated::stored(p, a); }
EMULATED void _mm512_storeu_ps(void* p, const __m512& a) { emulated::stored(p, a); }
EMULATED __m512i _mm512_set1_epi8(char x) { return emulated::each<__m512i, char>([=](size_t) { return x; }); }
EMULATED __m512i _mm512_set1_epi16(short x) { return emulated::each<__m512i, short>([=](size_t) { return x; }); }
EMULATED __m512i _mm512_set1_epi32(int x) { return emulated::each<__m512i, int>([=](size_t) { return x; }); }
EMULATED __m512 _mm512_set1_ps(float x) { return emulated::each<__m512, float>([=](size_t) { return x; }); }
template <class... Sixteen>
EMULATED __m512i _mm512_setr_epi32(Sixteen... x) { return std::bit_cast<__m512i>(std::array<int32_t, 16>{x...}); }
template <class... Sixteen>
EMULATED __m512 _mm512_setr_ps(Sixteen... x) { return std::bit_cast<__m512>(std::array<float, 16>{float(x)...}); }

// ---- binary32

EMULATED __m512 _mm512_add_ps(const __m512& a, const __m512& b) { return a + b; }
EMULATED __m512 _mm512_sub_ps(const __m512& a, const __m512& b) { return a - b; }
EMULATED __m512 _mm512_mul_ps(const __m512& a, const __m512& b) { return a * b; }
EMULATED __m512 _mm512_div_ps(const __m512& a, const __m512& b) { return a / b; }
EMULATED __m512 _mm512_max_ps(const __m512& a, const __m512& b) { return a > b ? a : b; }  // b if one is NaN, or both are zeros
EMULATED __m512 _mm512_min_ps(const __m512& a, const __m512& b) { return a < b ? a : b; }
EMULATED __m512 _mm512_roundscale_ps(const __m512& a, int how) {
  if (how != (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) emulated::refuse("a way to round");
  return emulated::each<__m512, float>([x = emulated::lanes<float>(a)](size_t i) { return std::nearbyint(x[i]); });
}
EMULATED __mmask16 _mm512_cmp_ps_mask(const __m512& a, const __m512& b, int predicate) {
  if (predicate == _CMP_NLT_UQ) return emulated::mask_of([=](unsigned i) { return !(a[i] < b[i]); });
  if (predicate == _CMP_GE_OQ) return emulated::mask_of([=](unsigned i) { return a[i] >= b[i]; });
  emulated::refuse("a comparison");
}
EMULATED __m512 _mm512_mask_mov_ps(const __m512& otherwise, __mmask16 mask, const __m512& a) {
  return emulated::each<__m512, float>([=](size_t i) { return mask >> i & 1 ? a[i] : otherwise[i]; });
}

// ---- conversions

INLINED __m512i _mm512_castps_si512(__m512 a) { return (__m512i)a; }
INLINED __m512 _mm512_castsi512_ps(__m512i a) { return (__m512)a; }
EMULATED __m512i _mm512_cvtepi8_epi16(const __m256i& a) { return (__m512i) __builtin_convertvector((emulated::Vector<int8_t, 32>)a, emulated::I16); }
EMULATED __m512i _mm512_cvtepi8_epi32(const __m128i& a) { return (__m512i) __builtin_convertvector((emulated::Vector<int8_t, 16>)a, emulated::I32); }
EMULATED __m512i _mm512_cvtepu8_epi32(const __m128i& a) { return (__m512i) __builtin_convertvector((emulated::Vector<uint8_t, 16>)a, emulated::I32); }
EMULATED __m512i _mm512_cvtepu16_epi32(const __m256i& a) { return (__m512i) __builtin_convertvector((emulated::Vector<uint16_t, 32>)a, emulated::I32); }
EMULATED __m256i _mm512_cvtepi32_epi16(const __m512i& a) { return (__m256i) __builtin_convertvector((emulated::U32)a, emulated::Vector<uint16_t, 32>); }
EMULATED __m128i _mm512_cvtepi32_epi8(const __m512i& a) { return (__m128i) __builtin_convertvector((emulated::U32)a, emulated::Vector<uint8_t, 16>); }
EMULATED __m512 _mm512_cvtepi32_ps(const __m512i& a) { return __builtin_convertvector((emulated::I32)a, __m512); }
EMULATED __m512d _mm512_cvtps_pd(const __m256& a) { return __builtin_convertvector(a, __m512d); }
EMULATED __m512i _mm512_cvtps_epi32(const __m512& a) {
  return emulated::each<__m512i, int32_t>([=](size_t i) { return emulated::to_int(a[i]); });
}
EMULATED __m512 _mm512_cvtph_ps(const __m256i& a) {
  return emulated::each<__m512, float>([x = emulated::lanes<uint16_t>(a)](size_t i) { return emulated::from_half(x[i]); });
}
EMULATED __m256bh _mm512_cvtneps_pbh(const __m512& a) {
  return emulated::each<__m256bh, uint16_t>([=](size_t i) { return emulated::to_bfloat16(a[i]); });
}
EMULATED __m512bh _mm512_cvtne2ps_pbh(const __m512& high, const __m512& low) {
  return emulated::each<__m512bh, uint16_t>([=](size_t i) { return emulated::to_bfloat16(i < 16 ? low[i] : high[i - 16]); });
}

// ---- integers

EMULATED __m512i _mm512_and_si512(const __m512i& a, const __m512i& b) { return a & b; }
EMULATED __m512i _mm512_or_si512(const __m512i& a, const __m512i& b) { return a | b; }
EMULATED __m512i _mm512_xor_si512(const __m512i& a, const __m512i& b) { return a ^ b; }
// Bit 4a + 2b + c of the table is the result for bits a, b, c.
EMULATED __m512i _mm512_ternarylogic_epi32(const __m512i& a, const __m512i& b, const __m512i& c, int table) {
  __m512i result = {};
  for (int i = 0; i < 8; ++i)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}
EMULATED __m512i _mm512_add_epi32(const __m512i& a, const __m512i& b) { return (__m512i)((emulated::U32)a + (emulated::U32)b); }
EMULATED __m512i _mm512_sub_epi32(const __m512i& a, const __m512i& b) { return (__m512i)((emulated::U32)a - (emulated::U32)b); }
EMULATED __m512i _mm512_sub_epi8(const __m512i& a, const __m512i& b) {
  using U8 = emulated::Vector<uint8_t, 64>;
  return (__m512i)((U8)a - (U8)b);
}
EMULATED __m512i _mm512_mullo_epi32(const __m512i& a, const __m512i& b) { return (__m512i)((emulated::U32)a * (emulated::U32)b); }
EMULATED __m512i _mm512_max_epi32(const __m512i& a, const __m512i& b) {
  return (__m512i)((emulated::I32)a > (emulated::I32)b ? (emulated::I32)a : (emulated::I32)b);
}
EMULATED __m512i _mm512_slli_epi32(const __m512i& a, unsigned count) { return count > 31 ? __m512i{} : (__m512i)((emulated::U32)a << count); }
EMULATED __m512i _mm512_srli_epi32(const __m512i& a, unsigned count) { return count > 31 ? __m512i{} : (__m512i)((emulated::U32)a >> count); }
EMULATED __m512i _mm512_srai_epi32(const __m512i& a, unsigned count) { return (__m512i)((emulated::I32)a >> (count > 31 ? 31 : int(count))); }
EMULATED __m512i _mm512_srli_epi16(const __m512i& a, unsigned count) { return count > 15 ? __m512i{} : (__m512i)((emulated::U16)a >> count); }
EMULATED __m512i _mm512_slli_epi16(const __m512i& a, unsigned count) { return count > 15 ? __m512i{} : (__m512i)((emulated::U16)a << count); }
EMULATED __m512i _mm512_srai_epi16(const __m512i& a, unsigned count) { return (__m512i)((emulated::I16)a >> (count > 15 ? 15 : count)); }
EMULATED __m512i _mm512_mullo_epi16(const __m512i& a, const __m512i& b) { return (__m512i)((emulated::U16)a * (emulated::U16)b); }

// Four products of an unsigned byte of `a` and a signed one of `b` join each sum, which does not saturate.
EMULATED __m512i _mm512_dpbusd_epi32(const __m512i& sums, const __m512i& a, const __m512i& b) {
  const auto x = emulated::lanes<uint8_t>(a);
  const auto y = emulated::lanes<int8_t>(b);
  return _mm512_add_epi32(sums, emulated::each<__m512i, int32_t>([&](size_t i) {
    int32_t sum = 0;
    for (size_t j = 4 * i; j < 4 * i + 4; ++j) sum += x[j] * y[j];
    return sum;
  }));
}
// Two products of signed words: likewise.
EMULATED __m512i _mm512_dpwssd_epi32(const __m512i& sums, const __m512i& a, const __m512i& b) {
  const auto x = emulated::lanes<int16_t>(a), y = emulated::lanes<int16_t>(b);
  return _mm512_add_epi32(sums, emulated::each<__m512i, uint32_t>([&](size_t i) {
    return uint32_t(x[2 * i] * y[2 * i]) + uint32_t(x[2 * i + 1] * y[2 * i + 1]);
  }));
}

// ---- permutations

INLINED __m256i _mm512_castsi512_si256(__m512i a) { return __m256i{a[0], a[1], a[2], a[3]}; }
EMULATED __m256i _mm512_extracti64x4_epi64(const __m512i& a, int half) {
  return half & 1 ? __m256i{a[4], a[5], a[6], a[7]} : __m256i{a[0], a[1], a[2], a[3]};
}
EMULATED __m256i _mm256_set_m128i(const __m128i& high, const __m128i& low) { return __m256i{low[0], low[1], high[0], high[1]}; }
EMULATED __m512i _mm512_broadcast_i32x4(const __m128i& a) { return __m512i{a[0], a[1], a[0], a[1], a[0], a[1], a[0], a[1]}; }
EMULATED __m128i _mm_unpacklo_epi8(const __m128i& a, const __m128i& b) {
  const auto even = emulated::lanes<uint8_t>(a), odd = emulated::lanes<uint8_t>(b);
  return emulated::each<__m128i, uint8_t>([&](size_t i) { return (i % 2 ? odd : even)[i / 2]; });
}
EMULATED __m128i _mm_unpackhi_epi8(const __m128i& a, const __m128i& b) {
  const auto even = emulated::lanes<uint8_t>(a), odd = emulated::lanes<uint8_t>(b);
  return emulated::each<__m128i, uint8_t>([&](size_t i) { return (i % 2 ? odd : even)[8 + i / 2]; });
}
// Within each 16 bytes; 0 where the index has its highest bit.
EMULATED __m512i _mm512_shuffle_epi8(const __m512i& a, const __m512i& index) {
  const auto x = emulated::lanes<uint8_t>(a), at = emulated::lanes<uint8_t>(index);
  return emulated::each<__m512i, uint8_t>([&](size_t i) { return at[i] & 0x80 ? 0 : x[i / 16 * 16 + at[i] % 16]; });
}
EMULATED __m512i _mm512_permutexvar_epi16(const __m512i& index, const __m512i& a) {
  const auto x = emulated::lanes<uint16_t>(a), at = emulated::lanes<uint16_t>(index);
  return emulated::each<__m512i, uint16_t>([&](size_t i) { return x[at[i] % 32]; });
}
EMULATED __m512i _mm512_permutex2var_epi16(const __m512i& a, const __m512i& index, const __m512i& b) {
  const auto x = emulated::lanes<uint16_t>(a), y = emulated::lanes<uint16_t>(b), at = emulated::lanes<uint16_t>(index);
  return emulated::each<__m512i, uint16_t>([&](size_t i) { return (at[i] & 32 ? y : x)[at[i] % 32]; });
}
EMULATED __m512 _mm512_permutexvar_ps(const __m512i& index, const __m512& a) {
  const auto x = emulated::lanes<float>(a);
  const auto at = emulated::lanes<uint32_t>(index);
  return emulated::each<__m512, float>([&](size_t i) { return x[at[i] % 16]; });
}
EMULATED __m512 _mm512_permutex2var_ps(const __m512& a, const __m512i& index, const __m512& b) {
  const auto x = emulated::lanes<float>(a), y = emulated::lanes<float>(b);
  const auto at = emulated::lanes<uint32_t>(index);
  return emulated::each<__m512, float>([&](size_t i) { return (at[i] & 16 ? y : x)[at[i] % 16]; });
}

#undef EMULATED
#undef INLINED
