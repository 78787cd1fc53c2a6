// ScalarVec: 16 lanes in plain arrays. The portable path, and the meaning that the other traits must reproduce.
//
// What a trait is: registers F (binary32) and I (int32) of kLanes lanes, the few operations the shared loops need, each
// float operation rounded on its own, and integer dot products `Dot4` (nibbles) and `Dot8` (bytes) that are exact. A
// "line" is 16 rows x 4 bytes of a ROM tile; lane n of a register stands for row n of the tile, so a register covers
// kLanes / 16 of a line.
#pragma once

#include <cmath>
#include <cstddef>

#include "vai/scalar_types.h"

#define VAI_UNROLL  // its registers are memory anyway
#define VAI_ROLLED

namespace vai {
namespace {

struct ScalarVec {
  static constexpr const char* kName = "scalar";
  static constexpr int kLanes = 16;
  static constexpr int kMaxRows = 3;  // rows that one tile call multiplies
  static constexpr int kBlocks = 2;   // n-blocks that one tile call multiplies when there are many rows
  static constexpr int kRegisters = 32;  // fewer: sums of many rows stand in memory
  static constexpr bool kPanels = false;  // whether weights of 2 bytes are widened once for many rows
  static constexpr bool kFetches = false;
  // Shaped like AVX-512's, only smaller: so its way through the shared loops is walked on every machine.
  static int row_block(int rows) { return rows < 3 ? rows : rows <= 16 ? 3 : 2; }

  struct F { float v[16]; };
  struct I { int32_t v[16]; };
  struct Mask { bool v[16]; };

#define VAI_LANES(T, expr) \
  T r; \
  for (int i = 0; i < 16; ++i) r.v[i] = (expr); \
  return r
  static F set1(float x) { VAI_LANES(F, x); }
  static F load(const float* p) { VAI_LANES(F, p[i]); }
  static void store(float* p, F x) { for (int i = 0; i < 16; ++i) p[i] = x.v[i]; }
  using Double = double;  // as many binary32 as are added up in binary64 at once; it has operator +=
  static Double load_double(const float* p) { return *p; }
  static F load_bf16(const void* p) { VAI_LANES(F, bf16_to_f32(load_as<uint16_t>((const char*)p + 2 * i))); }
  static F load_i8(const void* p) { VAI_LANES(F, float(load_as<int8_t>((const char*)p + i))); }
  static F load_f16(const void* p) { VAI_LANES(F, f16_to_f32(load_as<uint16_t>((const char*)p + 2 * i))); }
  static F load_e8m0(const uint8_t* p) { VAI_LANES(F, e8m0_to_f32(p[i])); }
  static F add(F a, F b) { VAI_LANES(F, a.v[i] + b.v[i]); }
  static F sub(F a, F b) { VAI_LANES(F, a.v[i] - b.v[i]); }
  static F mul(F a, F b) { VAI_LANES(F, a.v[i] * b.v[i]); }
  static F div(F a, F b) { VAI_LANES(F, a.v[i] / b.v[i]); }
  static F max(F a, F b) { VAI_LANES(F, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
  static F min(F a, F b) { VAI_LANES(F, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
  // To the nearest integer, half to even, for |x| < 2^22: the addition itself rounds.
  static F round(F a) { VAI_LANES(F, (a.v[i] + 12582912.0f) - 12582912.0f); }
  static F accumulate(F acc, F product) { return add(acc, product); }
  static I bits(F a) { VAI_LANES(I, std::bit_cast<int32_t>(a.v[i])); }
  static F from_bits(I a) { VAI_LANES(F, std::bit_cast<float>(a.v[i])); }
  static I iset1(int32_t x) { VAI_LANES(I, x); }
  static I iadd(I a, I b) { VAI_LANES(I, int32_t(uint32_t(a.v[i]) + uint32_t(b.v[i]))); }
  static I iand(I a, I b) { VAI_LANES(I, a.v[i] & b.v[i]); }
  static I ior(I a, I b) { VAI_LANES(I, a.v[i] | b.v[i]); }
  static I isub(I a, I b) { VAI_LANES(I, int32_t(uint32_t(a.v[i]) - uint32_t(b.v[i]))); }
  static I load_line(const void* p) { return load_as<I>(p); }
  static void store_line(void* p, I a) { std::memcpy(p, &a, sizeof a); }
  // Every lane to the left, or with a negative n to the right, zeros following.
  template <int n>
  static I shifted(I a) { VAI_LANES(I, int32_t(n >= 0 ? uint32_t(a.v[i]) << (n & 31) : uint32_t(a.v[i]) >> (-n & 31))); }
  static I imax(I a, I b) { VAI_LANES(I, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
  static I to_exponent(I a) { VAI_LANES(I, int32_t(uint32_t(a.v[i]) << 23)); }
  // Of integral values; where they are out of range or none, the least integer.
  static I to_int(F a) { VAI_LANES(I, a.v[i] >= -0x1p31f && a.v[i] < 0x1p31f ? int32_t(a.v[i]) : INT32_MIN); }
  static F to_float(I a) { VAI_LANES(F, float(a.v[i])); }
  static Mask greater_equal(F a, F b) { VAI_LANES(Mask, a.v[i] >= b.v[i]); }
  static Mask not_less(F a, F b) { VAI_LANES(Mask, !(a.v[i] < b.v[i])); }
  static F select(Mask m, F yes, F no) { VAI_LANES(F, m.v[i] ? yes.v[i] : no.v[i]); }
  static F where(Mask m, F a) { VAI_LANES(F, m.v[i] ? a.v[i] : 0.0f); }
  // The compiler changes nothing about the order in which values come about that are kept so.
  static void keep_in_order(F&) {}
  static void store_i8(int8_t* p, I a) { for (int i = 0; i < 16; ++i) p[i] = int8_t(a.v[i]); }

  // A line of F16 or BF16 tiles: 16 rows x (even k, odd k).
  static void f16_pairs(const uint8_t* p, F& even, F& odd) {
    for (int i = 0; i < 16; ++i) {
      even.v[i] = f16_to_f32(load_as<uint16_t>(p + 4 * i));
      odd.v[i] = f16_to_f32(load_as<uint16_t>(p + 4 * i + 2));
    }
  }
  static void bf16_pairs(const uint8_t* p, F& even, F& odd) {
    for (int i = 0; i < 16; ++i) {
      even.v[i] = bf16_to_f32(load_as<uint16_t>(p + 4 * i));
      odd.v[i] = bf16_to_f32(load_as<uint16_t>(p + 4 * i + 2));
    }
  }

  // Sums of weight code x activation over one group of 32 k. `correction` undoes the codes' offset.
  using Dot4 = I;
  struct Nibbles { uint8_t low[64], high[64]; };
  struct Bytes { uint8_t v[64]; };
  static Nibbles nibbles(const uint8_t* p) {
    Nibbles n;
    for (int i = 0; i < 64; ++i) n.low[i] = p[i] & 15, n.high[i] = p[i] >> 4;
    return n;
  }
  // With the bits above the fourth: those of `above` moved by kLow and kHigh, under kMask.
  template <int kLow, int kHigh, int kMask>
  static Nibbles join(const Nibbles& w, I above) {
    const auto low = load_as<Bytes>(shifted<kLow>(above).v), high = load_as<Bytes>(shifted<kHigh>(above).v);
    Nibbles n = w;
    for (int i = 0; i < 64; ++i) n.low[i] |= low.v[i] & kMask, n.high[i] |= high.v[i] & kMask;
    return n;
  }
  // The codes replaced by entries of a table of 16, all of them from 0 to 31.
  using Small = const int8_t*;
  static Small small(const int8_t* entries) { return entries; }
  static Nibbles look_up(const Nibbles& w, Small table) {
    Nibbles n;
    for (int i = 0; i < 64; ++i) n.low[i] = uint8_t(table[w.low[i]]), n.high[i] = uint8_t(table[w.high[i]]);
    return n;
  }
  // Columns whose products with codes of so many bits a Dot4 can hold.
  static constexpr int dot4_columns(int) { return 32; }
  static Dot4 dot4_begin(int32_t correction) { return iset1(correction); }
  // The activations that a line is multiplied with, loaded once for all its registers.
  static const int8_t* dot4_activations(const int8_t* a) { return a; }
  static constexpr bool kDot4Begins = true;  // dot4_begin holds the correction; else dot4_end takes it off
  static Dot4 dot4(Dot4 acc, const Nibbles& w, const int8_t* a) {
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 4; ++j) acc.v[i] += w.low[4 * i + j] * a[j] + w.high[4 * i + j] * a[4 + j];
    return acc;
  }
  static Dot4 dot4(const Nibbles& w, const int8_t* a) { return dot4(dot4_begin(0), w, a); }
  // What dot4_end takes off: kZero times a sum of activations.
  struct Offset {};
  template <int kZero>
  static Offset dot4_offset(const int32_t*) { return {}; }
  static I dot4_end(Dot4 acc, Offset) { return acc; }
  // total + dot * factor, the factors being signed bytes, one for each row.
  static I dot4_times(I total, Dot4 dot, I factor) { VAI_LANES(I, total.v[i] + dot.v[i] * factor.v[i]); }
  static I factor(const int8_t* p) { VAI_LANES(I, p[i]); }
  // Two signed bytes of each row, for sums of activations in pairs of int16: total + even * first sum + odd * second sum.
  struct Pairs { int8_t even[16], odd[16]; };
  static Pairs pairs(const int8_t* even, const int8_t* odd) {
    Pairs p;
    for (int i = 0; i < 16; ++i) p.even[i] = even[i], p.odd[i] = odd[i];
    return p;
  }
  static I dot_pairs(I total, const Pairs& p, int32_t sums) {
    VAI_LANES(I, total.v[i] + p.even[i] * int16_t(sums) + p.odd[i] * (sums >> 16));
  }

  using Dot8 = I;
  static Bytes bytes(const uint8_t* p) { return load_as<Bytes>(p); }
  static Dot8 dot8_begin(int32_t correction) { return iset1(correction); }
  static const int8_t* dot8_activations(const int8_t* a) { return a; }
  static Dot8 dot8(Dot8 acc, const Bytes& w, const int8_t* a) {
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 4; ++j) acc.v[i] += w.v[4 * i + j] * a[j];
    return acc;
  }
  static I dot8_end(Dot8 acc) { return acc; }

  // Codes that stand for signed bytes above -128. Multiplied with kWideZero added where instructions want
  // unsigned bytes; who adds the products up takes it off again.
  static constexpr int kWideZero = 128;
  using Wide = const int8_t*;
  static Wide wide(const int8_t* entries) { return entries; }
  static Nibbles look_up_wide(const Nibbles& w, Wide table) {
    Nibbles n;
    for (int i = 0; i < 64; ++i) n.low[i] = uint8_t(table[w.low[i]] + 128), n.high[i] = uint8_t(table[w.high[i]] + 128);
    return n;
  }
  static const int8_t* wide_activations(const int8_t* a) { return a; }
  static I dot_wide(I acc, const Nibbles& w, const int8_t* a) { return dot4(acc, w, a); }
  static I wide_factor(const int8_t* p) { return factor(p); }
  static I wide_times(I total, I dot, I factor) { return dot4_times(total, dot, factor); }

  static void fence() {}
  static void prefetch(const void*) {}
#undef VAI_LANES
};

}  // namespace
}  // namespace vai
