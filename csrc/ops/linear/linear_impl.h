// Linear layers straight from the ROM's tiles, in the exact kind: one lane is one output, K in ascending order, multiply
// and add rounded apart. A tile call multiplies R rows with NB blocks of 16 outputs into a small scratch; the epilogue then
// adds what is to be added and stores. Neither depends on how rows and blocks were grouped.
#pragma once

#include "codes.h"
#include "panels.h"
#include "vai/math.h"
#include "vai/ops.h"

namespace vai {
namespace {

constexpr int kRowsPerPass = 128;      // rows that share one pass over the weights: their activations stay in L2
constexpr int kPanelColumns = 256;     // of float weights that are made binary32 at once
constexpr int kRowsBoundByMemory = 16; // up to here the weights are the cost

// What a tile needs to know. `stride`: bytes between the blocks; `ahead`: bytes from a line to the one to prefetch.
struct TileArgs {
  const uint8_t* weight;
  size_t stride;
  int columns;
  const uint8_t* packed;
  const float* x;
  size_t ldx;
  size_t ahead;
  float* out;
  bool resume;  // float types: go on from what `out` holds
};

// The weights of columns k and k + 1 in a line of F16 or BF16.
template <class V, BlockType T>
inline __attribute__((always_inline)) void float_pairs(const uint8_t* line, typename V::F& even, typename V::F& odd) {
  if constexpr (T == BlockType::kF16)
    V::f16_pairs(line, even, odd);
  else
    V::bf16_pairs(line, even, odd);
}

// Groups of 32: a scale for each, and for Q4_1 and Q5_1 a minimum beside it. `kFetch`: whether lines ahead are prefetched.
template <class V, BlockType T, int R, int NB, bool kFetch = true>
__attribute__((noinline)) void quantized_tile(const TileArgs& t) {
  using F = typename V::F;
  using I = typename V::I;
  constexpr Layout kL = layout(T);
  constexpr int W = V::kLanes, H = 16 / W, kLineBytes = 4 * W;
  constexpr bool kNibbles = kL.bits < 8, kMinimum = T == BlockType::kQ4_1 || T == BlockType::kQ5_1;
  constexpr int kLines = kNibbles ? 4 : 8;  // of a group
  constexpr bool kRaised = T == BlockType::kMXFP4, kWide = is_wide(T), kShort = kNibbles && !kWide;
  constexpr int kBits = kRaised ? 5 : kL.bits;
  constexpr int kRun = kShort ? V::dot4_columns(kBits) / 8 : kLines;  // lines whose products one sum can hold
  constexpr int kZero = kMinimum ? 0 : kWide ? V::kWideZero : 1 << (kBits - 1);  // what weight 0 is multiplied as
  [[maybe_unused]] const auto table = table_of<V, T>();
  // The sums over groups stay in registers where there are enough; else they stand in the result's own place.
  constexpr bool kKept = V::kRegisters >= 2 * R * NB * H + 8;
  const uint8_t *block = t.weight, *record = t.packed;
  const size_t stride = t.stride, ahead = t.ahead;
  float* const out = t.out;
  F acc[R][NB][H];
  VAI_UNROLL for (int r = 0; r < R; ++r)
    VAI_UNROLL for (int j = 0; j < NB; ++j)
      VAI_UNROLL for (int h = 0; h < H; ++h) {
        acc[r][j][h] = V::set1(0.0f);
        if constexpr (!kKept) V::store(out + r * kScratchWidth + j * 16 + h * W, acc[r][j][h]);
      }
  auto group = [&](int half) __attribute__((always_inline)) {
    const int8_t* codes = (const int8_t*)record;
    const float* scales = (const float*)(record + R * 32);
    const int32_t* sums = (const int32_t*)(record + R * 36);
    typename V::Dot8 dot[R][NB][H];
    I whole[R][NB][H], above[NB][H];
    VAI_UNROLL for (int r = 0; r < R; ++r)
      VAI_UNROLL for (int j = 0; j < NB; ++j)
        VAI_UNROLL for (int h = 0; h < H; ++h)
          dot[r][j][h] = kShort ? V::dot4_begin(-kZero * sums[r]) : V::dot8_begin(-kZero * sums[r]);
    if constexpr (kL.high != 0)
      VAI_UNROLL for (int j = 0; j < NB; ++j)
        VAI_UNROLL for (int h = 0; h < H; ++h) {
          const uint8_t* line = block + size_t(j) * stride + kL.high + half * 64 + h * kLineBytes;
          if (kFetch && h == 0) V::prefetch(line + ahead);
          above[j][h] = V::load_line(line);
        }
    VAI_UNROLL for (int l = 0; l < kLines; ++l) {
      auto line_of = [&](int j, int h) __attribute__((always_inline)) {
        const uint8_t* line = block + size_t(j) * stride + kL.lines + (half * kLines + l) * 64 + h * kLineBytes;
        if (kFetch && h == 0) V::prefetch(line + ahead);
        return line;
      };
      if constexpr (kWide) {
        typename V::Nibbles w[NB][H];
        VAI_UNROLL for (int j = 0; j < NB; ++j)
          VAI_UNROLL for (int h = 0; h < H; ++h) w[j][h] = V::look_up_wide(V::nibbles(line_of(j, h)), table);
        VAI_UNROLL for (int r = 0; r < R; ++r) {
          const auto a = V::wide_activations(codes + r * 32 + 8 * l);
          VAI_UNROLL for (int j = 0; j < NB; ++j)
            VAI_UNROLL for (int h = 0; h < H; ++h) dot[r][j][h] = V::dot_wide(dot[r][j][h], w[j][h], a);
        }
      } else if constexpr (kNibbles) {
        typename V::Nibbles w[NB][H];
        VAI_UNROLL for (int j = 0; j < NB; ++j)
          VAI_UNROLL for (int h = 0; h < H; ++h) {
            w[j][h] = codes_of<V, kL.bits>(line_of(j, h), above[j][h], l);
            if constexpr (kRaised) w[j][h] = V::look_up(w[j][h], table);
          }
        VAI_UNROLL for (int r = 0; r < R; ++r) {
          const auto a = V::dot4_activations(codes + r * 32 + 8 * l);
          VAI_UNROLL for (int j = 0; j < NB; ++j)
            VAI_UNROLL for (int h = 0; h < H; ++h) {
              if (l > 0 && l % kRun == 0) {
                const I part = V::dot4_end(dot[r][j][h], V::template dot4_offset<0>(sums));
                whole[r][j][h] = l == kRun ? part : V::iadd(whole[r][j][h], part);
                dot[r][j][h] = V::dot4(w[j][h], a);
              } else {
                dot[r][j][h] = !V::kDot4Begins && l == 0 ? V::dot4(w[j][h], a) : V::dot4(dot[r][j][h], w[j][h], a);
              }
            }
        }
      } else {
        typename V::Bytes w[NB][H];
        VAI_UNROLL for (int j = 0; j < NB; ++j)
          VAI_UNROLL for (int h = 0; h < H; ++h) w[j][h] = V::bytes(line_of(j, h));
        VAI_UNROLL for (int r = 0; r < R; ++r) {
          const auto a = V::dot8_activations(codes + r * 32 + 4 * l);
          VAI_UNROLL for (int j = 0; j < NB; ++j)
            VAI_UNROLL for (int h = 0; h < H; ++h) dot[r][j][h] = V::dot8(dot[r][j][h], w[j][h], a);
        }
      }
    }
    V::fence();
    F scale[NB][H], minimum[NB][H];
    VAI_UNROLL for (int j = 0; j < NB; ++j)
      VAI_UNROLL for (int h = 0; h < H; ++h) {
        const uint8_t* head = block + size_t(j) * stride;
        const uint8_t* scale_line = head + half * 32 + h * W * 2;
        scale[j][h] = kRaised ? V::load_e8m0(head + half * 16 + h * W) : V::load_f16(scale_line);
        if constexpr (kMinimum) minimum[j][h] = V::load_f16(scale_line + 64);
      }
    VAI_UNROLL for (int r = 0; r < R; ++r) {
      const F own = V::set1(scales[r]);
      const auto offset = V::template dot4_offset<kZero>(sums + r);
      VAI_UNROLL for (int j = 0; j < NB; ++j)
        VAI_UNROLL for (int h = 0; h < H; ++h) {
          I sum = kShort ? V::dot4_end(dot[r][j][h], offset) : V::dot8_end(dot[r][j][h]);
          if constexpr (kRun < kLines) sum = V::iadd(whole[r][j][h], sum);
          F product = V::mul(V::to_float(sum), V::mul(scale[j][h], own));
          if constexpr (kMinimum)
            product = V::add(product, V::mul(V::set1(float(sums[r])), V::mul(minimum[j][h], own)));
          float* const at = out + r * kScratchWidth + j * 16 + h * W;
          if constexpr (kKept)
            acc[r][j][h] = V::accumulate(acc[r][j][h], product);
          else
            V::store(at, V::add(V::load(at), product));
        }
    }
    record += R * record_bytes(kGroup);
  };
  for (int k = t.columns; k > 0; k -= 64, block += kL.bytes) {
    if constexpr (kFetch) VAI_UNROLL for (int j = 0; j < NB; ++j) V::prefetch(block + size_t(j) * stride + ahead);
    if constexpr (kFetch && kMinimum) VAI_UNROLL for (int j = 0; j < NB; ++j) V::prefetch(block + size_t(j) * stride + 64 + ahead);
    group(0);
    if (k > kGroup) group(1);
  }
  if constexpr (kKept)
    VAI_UNROLL for (int r = 0; r < R; ++r)
      VAI_UNROLL for (int j = 0; j < NB; ++j)
        VAI_UNROLL for (int h = 0; h < H; ++h) V::store(out + r * kScratchWidth + j * 16 + h * W, acc[r][j][h]);
}

// Groups of 256 with integer scales of 32 columns (Q4_K, Q5_K: and minimums; IQ4_XS) or of 16 (Q6_K): integers to the end.
template <class V, BlockType T, int R, int NB, bool kFetch = true>
__attribute__((noinline)) void wide_tile(const TileArgs& t) {
  using F = typename V::F;
  using I = typename V::I;
  constexpr Layout kL = layout(T);
  constexpr int W = V::kLanes, H = 16 / W, kLineBytes = 4 * W;
  constexpr bool kWide = is_wide(T), kMinimum = T != BlockType::kQ6_K && !kWide;
  constexpr bool kSums = !kWide || V::kWideZero != 0;  // whether sums of the activations are needed
  constexpr int kSpan = T == BlockType::kQ6_K ? 16 : 32, kSpans = kWideGroup / kSpan;  // columns that share an integer scale
  constexpr int kLines = kSpan / 8;
  constexpr int kRun = !kWide && V::dot4_columns(kL.bits) < kSpan ? V::dot4_columns(kL.bits) / 8 : kLines;
  [[maybe_unused]] const auto table = table_of<V, T>();
  const uint8_t *block = t.weight, *record = t.packed;
  const size_t stride = t.stride, ahead = t.ahead;
  constexpr bool kKept = V::kRegisters > 16;
  auto factor_of = [](const int8_t* p) __attribute__((always_inline)) {
    if constexpr (kWide)
      return V::wide_factor(p);
    else
      return V::factor(p);
  };
  auto times = [](I total, I dot, I factor) __attribute__((always_inline)) {
    if constexpr (kWide)
      return V::wide_times(total, dot, factor);
    else
      return V::dot4_times(total, dot, factor);
  };
  float* const out = t.out;
  F acc[R][NB][H];
  VAI_UNROLL for (int r = 0; r < R; ++r)
    VAI_UNROLL for (int j = 0; j < NB; ++j)
      VAI_UNROLL for (int h = 0; h < H; ++h) {
        acc[r][j][h] = V::set1(0.0f);
        if constexpr (!kKept) V::store(out + r * kScratchWidth + j * 16 + h * W, acc[r][j][h]);
      }
  for (int k = t.columns; k > 0; k -= kWideGroup, block += kL.bytes, record += R * record_bytes(kWideGroup)) {
    const int8_t* codes = (const int8_t*)record;
    const float* scales = (const float*)(record + R * 256);
    const int32_t* sums = (const int32_t*)(record + R * (kSpan == 32 ? 260 : 276));
    alignas(64) int8_t unpacked[NB][2][128];
    const int8_t *factors[NB], *with_sums[NB];  // [kSpans][16 rows]; what the sums of the activations are multiplied with
    VAI_UNROLL for (int j = 0; j < NB; ++j) {
      const uint8_t* head = block + size_t(j) * stride;
      if constexpr (kFetch) VAI_UNROLL for (int line = 0; line < kL.lines; line += 64) V::prefetch(head + line + ahead);
      if constexpr (kMinimum) {
        six_bit_scales<V>(head, unpacked[j][0], unpacked[j][1]);
        factors[j] = unpacked[j][0];
        with_sums[j] = unpacked[j][1];
      } else if constexpr (kWide) {
        signed_six_bits(head, unpacked[j][0]);
        factors[j] = with_sums[j] = unpacked[j][0];
      } else {
        factors[j] = with_sums[j] = (const int8_t*)head + 64;
      }
    }
    I total[R][NB][H];
    alignas(64) int32_t parked[kKept ? 1 : R * NB * 16];  // the totals, where registers are few
    VAI_UNROLL for (int r = 0; r < R; ++r)
      VAI_UNROLL for (int j = 0; j < NB; ++j)
        VAI_UNROLL for (int h = 0; h < H; ++h) {
          total[r][j][h] = V::iset1(0);
          if constexpr (!kKept) V::store_line(parked + (r * NB + j) * 16 + h * W, total[r][j][h]);
        }
    VAI_ROLLED for (int g = 0; g < kSpans; ++g) {
      const int8_t* a = codes + g * kSpan / 32 * R * 32 + g * kSpan % 32;
      typename V::Dot4 dot[R][NB][H];
      I above[NB][H];
      if constexpr (kL.high != 0)
        VAI_UNROLL for (int j = 0; j < NB; ++j)
          VAI_UNROLL for (int h = 0; h < H; ++h) {
            const uint8_t* line = block + size_t(j) * stride + kL.high + g * 64 + h * kLineBytes;
            if (kFetch && h == 0) V::prefetch(line + ahead);
            above[j][h] = V::load_line(line);
          }
      VAI_UNROLL for (int l = 0; l < kLines; ++l) {
        typename V::Nibbles w[NB][H];
        VAI_UNROLL for (int j = 0; j < NB; ++j)
          VAI_UNROLL for (int h = 0; h < H; ++h) {
            const uint8_t* line = block + size_t(j) * stride + kL.lines + (g * kLines + l) * 64 + h * kLineBytes;
            if (kFetch && h == 0) V::prefetch(line + ahead);
            if constexpr (kWide)
              w[j][h] = V::look_up_wide(V::nibbles(line), table);
            else
              w[j][h] = codes_of<V, kL.bits>(line, above[j][h], l);
          }
        if constexpr (kWide) {
          VAI_UNROLL for (int r = 0; r < R; ++r) {
            const auto mine = V::wide_activations(a + r * 32 + 8 * l);
            VAI_UNROLL for (int j = 0; j < NB; ++j)
              VAI_UNROLL for (int h = 0; h < H; ++h)
                dot[r][j][h] = V::dot_wide(l == 0 ? V::iset1(0) : dot[r][j][h], w[j][h], mine);
          }
        } else VAI_UNROLL for (int r = 0; r < R; ++r) {
          const auto mine = V::dot4_activations(a + r * 32 + 8 * l);
          VAI_UNROLL for (int j = 0; j < NB; ++j)
            VAI_UNROLL for (int h = 0; h < H; ++h)
              dot[r][j][h] = l % kRun == 0 ? V::dot4(w[j][h], mine) : V::dot4(dot[r][j][h], w[j][h], mine);
        }
        if ((l + 1) % kRun == 0)
          VAI_UNROLL for (int j = 0; j < NB; ++j)
            VAI_UNROLL for (int h = 0; h < H; ++h) {
              const auto factor = factor_of(factors[j] + g * 16 + h * W);
              VAI_UNROLL for (int r = 0; r < R; ++r) {
                int32_t* const at = parked + (kKept ? 0 : (r * NB + j) * 16 + h * W);
                if constexpr (kKept)
                  total[r][j][h] = times(total[r][j][h], dot[r][j][h], factor);
                else
                  V::store_line(at, times(V::load_line(at), dot[r][j][h], factor));
              }
            }
      }
    }
    I offset[R][NB][H];
    VAI_UNROLL for (int r = 0; r < R; ++r)
      VAI_UNROLL for (int j = 0; j < NB; ++j)
        VAI_UNROLL for (int h = 0; h < H; ++h) offset[r][j][h] = V::iset1(0);
    if constexpr (kSums) VAI_ROLLED for (int i = 0; i < kSpans / 2; ++i)
      VAI_UNROLL for (int j = 0; j < NB; ++j)
        VAI_UNROLL for (int h = 0; h < H; ++h) {
          const int8_t* even = with_sums[j] + 2 * i * 16 + h * W;
          const auto pairs = V::pairs(even, even + 16);
          VAI_UNROLL for (int r = 0; r < R; ++r) offset[r][j][h] = V::dot_pairs(offset[r][j][h], pairs, sums[i * R + r]);
        }
    VAI_UNROLL for (int j = 0; j < NB; ++j)
      VAI_UNROLL for (int h = 0; h < H; ++h) {
        const uint8_t* head = block + size_t(j) * stride + h * W * 2;
        const F scale = V::load_f16(head);
        VAI_UNROLL for (int r = 0; r < R; ++r) {
          if constexpr (!kKept) total[r][j][h] = V::load_line(parked + (r * NB + j) * 16 + h * W);
          const F mine = V::set1(scales[r]);
          F product;
          if constexpr (kMinimum) {
            const F minimum = V::mul(V::to_float(offset[r][j][h]), V::mul(V::load_f16(head + 32), mine));
            product = V::sub(V::mul(V::to_float(total[r][j][h]), V::mul(scale, mine)), minimum);
          } else {
            I centred = total[r][j][h];
            if constexpr (kSums) centred = V::isub(centred, V::template shifted<kWide ? 7 : 5>(offset[r][j][h]));
            product = V::mul(V::to_float(centred), V::mul(scale, mine));
          }
          float* const at = out + r * kScratchWidth + j * 16 + h * W;
          if constexpr (kKept)
            acc[r][j][h] = V::accumulate(acc[r][j][h], product);
          else
            V::store(at, V::add(V::load(at), product));
        }
      }
  }
  if constexpr (kKept)
    VAI_UNROLL for (int r = 0; r < R; ++r)
      VAI_UNROLL for (int j = 0; j < NB; ++j)
        VAI_UNROLL for (int h = 0; h < H; ++h) V::store(out + r * kScratchWidth + j * 16 + h * W, acc[r][j][h]);
}

template <class V, BlockType T, int R, int NB>
__attribute__((noinline)) void float_tile(const TileArgs& t) {
  using F = typename V::F;
  constexpr int W = V::kLanes, H = 16 / W;
  const uint8_t* line = t.weight;
  const float* x = t.x;
  const size_t stride = t.stride, ahead = t.ahead, ldx = t.ldx;
  F acc[R][NB][H];
  VAI_UNROLL for (int r = 0; r < R; ++r)
    VAI_UNROLL for (int j = 0; j < NB; ++j)
      VAI_UNROLL for (int h = 0; h < H; ++h)
        acc[r][j][h] = t.resume ? V::load(t.out + r * kScratchWidth + j * 16 + h * W) : V::set1(0.0f);
  auto step = [&](int k, const F (&w)[NB][H]) __attribute__((always_inline)) {
    VAI_UNROLL for (int r = 0; r < R; ++r) {
      const F own = V::set1(x[size_t(r) * ldx + size_t(k)]);
      VAI_UNROLL for (int j = 0; j < NB; ++j)
        VAI_UNROLL for (int h = 0; h < H; ++h) acc[r][j][h] = V::accumulate(acc[r][j][h], V::mul(own, w[j][h]));
    }
  };
  if constexpr (T == BlockType::kF32) {
    for (int k = 0; k < t.columns; ++k, line += 64) {
      F w[NB][H];
      VAI_UNROLL for (int j = 0; j < NB; ++j) {
        V::prefetch(line + size_t(j) * stride + ahead);
        VAI_UNROLL for (int h = 0; h < H; ++h) w[j][h] = V::load((const float*)(line + size_t(j) * stride + h * W * 4));
      }
      step(k, w);
    }
  } else {
    auto pair = [&](F (&even)[NB][H], F (&odd)[NB][H]) __attribute__((always_inline)) {
      VAI_UNROLL for (int j = 0; j < NB; ++j) {
        V::prefetch(line + size_t(j) * stride + ahead);
        VAI_UNROLL for (int h = 0; h < H; ++h) float_pairs<V, T>(line + size_t(j) * stride + h * W * 4, even[j][h], odd[j][h]);
      }
    };
    F even[NB][H], odd[NB][H];
    int k = 0;
    for (; k + 1 < t.columns; k += 2, line += 64) {
      pair(even, odd);
      step(k, even);
      step(k + 1, odd);
    }
    if (k < t.columns) {
      pair(even, odd);
      step(k, even);
    }
  }
  VAI_UNROLL for (int r = 0; r < R; ++r)
    VAI_UNROLL for (int j = 0; j < NB; ++j)
      VAI_UNROLL for (int h = 0; h < H; ++h) V::store(t.out + r * kScratchWidth + j * 16 + h * W, acc[r][j][h]);
}

template <class V, BlockType T, int NB, int R = V::kMaxRows>
void tile_of_rows(int rows, const TileArgs& t) {
  if constexpr (R > 0) {
    if (rows != R) return tile_of_rows<V, T, NB, R - 1>(rows, t);
    // Of many rows only the last tile fetches: in the others its instructions would take up to a tenth of the time.
    if constexpr (V::kFetches && V::kBlocks == 2 && NB == 2 && layout(T).group != 0 && R == V::row_block(kRowsBoundByMemory + 1))
      if (t.ahead == 0) {
        if constexpr (layout(T).group == kWideGroup)
          return wide_tile<V, T, R, NB, false>(t);
        else
          return quantized_tile<V, T, R, NB, false>(t);
      }
    if constexpr (layout(T).group == kWideGroup)
      wide_tile<V, T, R, NB>(t);
    else if constexpr (layout(T).group == kGroup)
      quantized_tile<V, T, R, NB>(t);
    else
      float_tile<V, T, R, NB>(t);
  }
}

template <class V, int NB>
void tile(BlockType type, int rows, const TileArgs& t) {
  switch (type) {
    case BlockType::kQ4_0: return tile_of_rows<V, BlockType::kQ4_0, NB>(rows, t);
    case BlockType::kQ8_0: return tile_of_rows<V, BlockType::kQ8_0, NB>(rows, t);
    case BlockType::kF16: return tile_of_rows<V, BlockType::kF16, NB>(rows, t);
    case BlockType::kBF16: return tile_of_rows<V, BlockType::kBF16, NB>(rows, t);
    case BlockType::kF32: return tile_of_rows<V, BlockType::kF32, NB>(rows, t);
    case BlockType::kQ4_K: return tile_of_rows<V, BlockType::kQ4_K, NB>(rows, t);
    case BlockType::kQ5_K: return tile_of_rows<V, BlockType::kQ5_K, NB>(rows, t);
    case BlockType::kQ6_K: return tile_of_rows<V, BlockType::kQ6_K, NB>(rows, t);
    case BlockType::kQ4_1: return tile_of_rows<V, BlockType::kQ4_1, NB>(rows, t);
    case BlockType::kQ5_0: return tile_of_rows<V, BlockType::kQ5_0, NB>(rows, t);
    case BlockType::kQ5_1: return tile_of_rows<V, BlockType::kQ5_1, NB>(rows, t);
    case BlockType::kIQ4_NL: return tile_of_rows<V, BlockType::kIQ4_NL, NB>(rows, t);
    case BlockType::kIQ4_XS: return tile_of_rows<V, BlockType::kIQ4_XS, NB>(rows, t);
    case BlockType::kMXFP4: return tile_of_rows<V, BlockType::kMXFP4, NB>(rows, t);
    default: return;  // raw blocks are read by float_rows alone
  }
}

// Output block `block` of a gated layer, columns [h, h + V::kLanes) of it: act(first block) * second block.
template <class V>
inline __attribute__((always_inline)) typename V::F gated_unit(const LinearArgs& a, int block, const float* scratch, int h) {
  typename V::F gate = V::load(scratch + h), up = V::load(scratch + 16 + h);
  if (a.bias) {
    const float* bias = a.bias + size_t(a.bias_first + block * a.bias_step) * 16;
    gate = V::add(gate, V::load(bias + h)), up = V::add(up, V::load(bias + 16 + h));
  }
  return V::mul(a.act == Act::kSilu ? silu<V>(gate) : gelu_tanh<V>(gate), up);
}

// scratch [R][blocks * 16] -> out: + addend, + bias, + residual, softcap; gated: act(first block) * second block.
template <class V>
void epilogue(const LinearArgs& a, int first_row, int rows, int block, int blocks, const float* scratch) {
  using F = typename V::F;
  constexpr int W = V::kLanes;
  for (int r = 0; r < rows; ++r) {
    const size_t row = size_t(first_row + r);
    const float* s = scratch + r * kScratchWidth;
    if (a.gated) {
      for (int h = 0; h < 16; h += W) V::store(a.out + row * a.ldo + size_t(block) * 16 + h, gated_unit<V>(a, block, s, h));
      continue;
    }
    for (int j = 0; j < blocks; ++j) {
      const size_t column = size_t(block + j) * 16;
      const float* bias = a.bias ? a.bias + size_t(a.bias_first + (block + j) * a.bias_step) * 16 : nullptr;
      for (int h = 0; h < 16; h += W) {
        F y = V::load(s + j * 16 + h);
        if (a.addend) y = V::add(y, V::load(a.addend + row * a.lda + column + h));
        if (bias) y = V::add(y, V::load(bias + h));
        if (a.residual) y = V::add(y, V::load(a.residual + row * a.ldr + column + h));
        if (a.softcap != 0.0f) y = softcapped<V>(y, a.softcap);
        V::store(a.out + row * a.ldo + column + h, y);
      }
    }
  }
}

// `columns` of a block of halves as binary32, [columns][16].
template <class V, BlockType T>
void widen(const uint8_t* line, int columns, float* panel) {
  constexpr int W = V::kLanes;
  for (int k = 0; k < columns; k += 2, line += 64)
    for (int h = 0; h < 16; h += W) {
      typename V::F even, odd;
      float_pairs<V, T>(line + h * 4, even, odd);
      V::store(panel + k * 16 + h, even);
      V::store(panel + k * 16 + 16 + h, odd);
    }
}

// Float weights under many rows, and raw blocks under any: a stretch of columns at a time is made binary32 once and stays
// close by for all of them.
template <class V>
void float_rows(const LinearArgs& a, int first, int end, const uint8_t* weight, size_t stride, int blocks, float* sums) {
  alignas(64) float panel[kPanelColumns * 16];
  const bool wide = a.weight.type == BlockType::kF32, raw = is_raw(a.weight.type);
  const Layout l = layout(a.weight.type);
  // Rows in tiles of like size: one of a single row would wait for its own additions.
  const int tiles = (end - first + V::kMaxRows - 1) / V::kMaxRows, each = (end - first + tiles - 1) / tiles;
  for (int j = 0; j < blocks; ++j)
    for (int k = 0; k < a.weight.columns; k += kPanelColumns) {
      const int columns = a.weight.columns - k < kPanelColumns ? a.weight.columns - k : kPanelColumns;
      const uint8_t* lines = weight + size_t(j) * stride + size_t(k / l.columns) * size_t(l.bytes);
      if (a.weight.type == BlockType::kF16) widen<V, BlockType::kF16>(lines, columns, panel);
      if (a.weight.type == BlockType::kBF16) widen<V, BlockType::kBF16>(lines, columns, panel);
      if (raw) raw_columns(a.weight.type, lines, panel);
      TileArgs t{};
      t.weight = wide ? lines : (const uint8_t*)panel;
      t.columns = columns;
      t.ldx = a.ldx;
      t.resume = k > 0;
      for (int r = first; r < end; r += each) {
        t.x = a.x + size_t(r) * a.ldx + k;
        t.out = sums + (r - first) * kScratchWidth + j * 16;
        tile_of_rows<V, BlockType::kF32, 1>(end - r < each ? end - r : each, t);
      }
    }
}

template <class V>
void linear(const LinearArgs& a, int begin, int end) {
  const bool many = a.rows > kRowsBoundByMemory;
  const int row_block = V::row_block(a.rows), wide = many ? V::kBlocks : 1;
  const int per_pass = many ? kRowsPerPass / row_block * row_block : a.rows;
  const size_t row_bytes = a.weight.row_bytes();
  const size_t packed_bytes = a.packed ? packed_row_bytes(layout(a.weight.type).group, a.weight.columns) : 0;
  bool panels = is_raw(a.weight.type);
  if constexpr (V::kPanels) panels = panels || V::panels_pay(a.weight.type, a.rows);
  float scratch[kRowsPerPass * kScratchWidth];
  for (int m0 = 0; m0 < a.rows; m0 += per_pass) {
    const int m1 = a.rows - m0 < per_pass ? a.rows : m0 + per_pass;
    for (int i = begin; i < end;) {
      const int outputs = a.gated || end - i < wide ? 1 : wide, blocks = a.gated ? 2 : outputs;
      TileArgs t{};
      t.weight = a.weight.block(i);
      t.stride = row_bytes * size_t(a.gated ? 1 : a.weight.step);
      t.columns = a.weight.columns;
      t.ldx = a.ldx;
      if (panels) {
        if constexpr (V::kPanels)
          if (a.packed)
            for (int j = 0; j < blocks; ++j) panel_rows<V>(a, m0, m1, t.weight + size_t(j) * t.stride, scratch + j * 16);
        if (!a.packed) float_rows<V>(a, m0, m1, t.weight, t.stride, blocks, scratch);
        epilogue<V>(a, m0, m1 - m0, i, outputs, scratch);
        i += outputs;
        continue;
      }
      for (int r = m0; r < m1; r += row_block) {
        const int rows = m1 - r < row_block ? m1 - r : row_block;
        // One pass over these blocks: prefetch along the stream. Several: the last one fetches the next blocks.
        t.ahead = m1 - m0 <= row_block ? a.ahead : r + rows >= m1 ? row_bytes * size_t(blocks) : 0;
        if (a.packed) t.packed = a.packed + size_t(r) * packed_bytes;
        if (a.x) t.x = a.x + size_t(r) * a.ldx;
        t.out = scratch;
        if constexpr (V::kBlocks == 2) {
          if (blocks == 2)
            tile<V, 2>(a.weight.type, rows, t);
          else
            tile<V, 1>(a.weight.type, rows, t);
        } else {
          TileArgs one = t;
          for (int j = 0; j < blocks; ++j, one.weight += t.stride, one.out += 16) tile<V, 1>(a.weight.type, rows, one);
        }
        epilogue<V>(a, r, rows, i, outputs, scratch);
      }
      i += outputs;
    }
  }
}

}  // namespace
}  // namespace vai
