// Linear layers straight from the ROM's tiles, in the exact kind: one lane is one output, K in ascending order, multiply
// and add rounded apart. A tile call multiplies R rows with NB blocks of 16 outputs into a small scratch; the epilogue then
// adds what is to be added and stores. Neither depends on how rows and blocks were grouped.
#pragma once

#include "vai/math.h"
#include "vai/ops.h"

namespace vai {
namespace {

constexpr int kScratchWidth = 32;      // outputs of two blocks
constexpr int kRowsPerPass = 128;      // rows that share one pass over the weights: their activations stay in L2
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
};

// The codes of nibble line i of a group: its own four bits, and above them those that line `above` has for it. Once the
// loop over i is unrolled one case is left.
template <class V, int kBits>
inline __attribute__((always_inline)) typename V::Nibbles codes_of(const uint8_t* line, const typename V::I& above, int i) {
  const typename V::Nibbles w = V::nibbles(line);
  if constexpr (kBits == 5) {
    if (i == 0) return V::template join<4, 3, 0x10>(w, above);
    if (i == 1) return V::template join<2, 1, 0x10>(w, above);
    if (i == 2) return V::template join<0, -1, 0x10>(w, above);
    return V::template join<-2, -3, 0x10>(w, above);
  } else if constexpr (kBits == 6) {
    return i == 0 ? V::template join<4, 2, 0x30>(w, above) : V::template join<0, -2, 0x30>(w, above);
  } else {
    return w;
  }
}

// Groups of 32: a scale for each, and for Q4_1 and Q5_1 a minimum beside it.
template <class V, BlockType T, int R, int NB>
__attribute__((noinline)) void quantized_tile(const TileArgs& t) {
  using F = typename V::F;
  using I = typename V::I;
  constexpr Layout kL = layout(T);
  constexpr int W = V::kLanes, H = 16 / W, kLineBytes = 4 * W;
  constexpr bool kNibbles = kL.bits < 8, kMinimum = T == BlockType::kQ4_1 || T == BlockType::kQ5_1;
  constexpr int kLines = kNibbles ? 4 : 8;  // of a group
  constexpr int kRun = kNibbles ? V::dot4_columns(kL.bits) / 8 : kLines;  // lines whose products one sum can hold
  constexpr int kZero = kMinimum ? 0 : 1 << (kL.bits - 1);                // the code of weight 0
  const uint8_t *block = t.weight, *record = t.packed;
  const size_t stride = t.stride, ahead = t.ahead;
  F acc[R][NB][H];
  VAI_UNROLL for (int r = 0; r < R; ++r)
    VAI_UNROLL for (int j = 0; j < NB; ++j)
      VAI_UNROLL for (int h = 0; h < H; ++h) acc[r][j][h] = V::set1(0.0f);
  auto group = [&](int half) __attribute__((always_inline)) {
    const int8_t* codes = (const int8_t*)record;
    const float* scales = (const float*)(record + R * 32);
    const int32_t* sums = (const int32_t*)(record + R * 36);
    VAI_UNROLL for (int h = 0; h < H; ++h) {
      typename V::Dot8 dot[R][NB];
      I whole[R][NB], above[NB];
      VAI_UNROLL for (int r = 0; r < R; ++r)
        VAI_UNROLL for (int j = 0; j < NB; ++j)
          dot[r][j] = kNibbles ? V::dot4_begin(-kZero * sums[r]) : V::dot8_begin(-kZero * sums[r]);
      if constexpr (kL.high != 0)
        VAI_UNROLL for (int j = 0; j < NB; ++j) {
          const uint8_t* line = block + size_t(j) * stride + kL.high + half * 64 + h * kLineBytes;
          if (h == 0) V::prefetch(line + ahead);
          above[j] = V::load_line(line);
        }
      VAI_UNROLL for (int l = 0; l < kLines; ++l) {
        if constexpr (kNibbles) {
          typename V::Nibbles w[NB];
          VAI_UNROLL for (int j = 0; j < NB; ++j) {
            const uint8_t* line = block + size_t(j) * stride + kL.lines + (half * kLines + l) * 64 + h * kLineBytes;
            if (h == 0) V::prefetch(line + ahead);
            w[j] = codes_of<V, kL.bits>(line, above[j], l);
          }
          VAI_UNROLL for (int r = 0; r < R; ++r)
            VAI_UNROLL for (int j = 0; j < NB; ++j) {
              if (l > 0 && l % kRun == 0) {
                const I part = V::dot4_end(dot[r][j], 0);
                whole[r][j] = l == kRun ? part : V::iadd(whole[r][j], part);
                dot[r][j] = V::dot4(w[j], codes + r * 32 + 8 * l);
              } else {
                dot[r][j] = V::dot4(dot[r][j], w[j], codes + r * 32 + 8 * l);
              }
            }
        } else {
          typename V::Bytes w[NB];
          VAI_UNROLL for (int j = 0; j < NB; ++j) {
            const uint8_t* line = block + size_t(j) * stride + kL.lines + (half * kLines + l) * 64 + h * kLineBytes;
            if (h == 0) V::prefetch(line + ahead);
            w[j] = V::bytes(line);
          }
          VAI_UNROLL for (int r = 0; r < R; ++r)
            VAI_UNROLL for (int j = 0; j < NB; ++j) dot[r][j] = V::dot8(dot[r][j], w[j], codes + r * 32 + 4 * l);
        }
      }
      V::fence();
      VAI_UNROLL for (int j = 0; j < NB; ++j) {
        const uint8_t* scale_line = block + size_t(j) * stride + half * 32 + h * W * 2;
        const F scale = V::load_f16(scale_line);
        VAI_UNROLL for (int r = 0; r < R; ++r) {
          I sum = kNibbles ? V::dot4_end(dot[r][j], -kZero * sums[r]) : V::dot8_end(dot[r][j]);
          if constexpr (kRun < kLines) sum = V::iadd(whole[r][j], sum);
          F product = V::mul(V::to_float(sum), V::mul(scale, V::set1(scales[r])));
          if constexpr (kMinimum)
            product = V::add(product, V::mul(V::set1(float(sums[r])), V::mul(V::load_f16(scale_line + 64), V::set1(scales[r]))));
          acc[r][j][h] = V::accumulate(acc[r][j][h], product);
        }
      }
    }
    record += R * record_bytes(kGroup);
  };
  for (int k = t.columns; k > 0; k -= 64, block += kL.bytes) {
    VAI_UNROLL for (int j = 0; j < NB; ++j) V::prefetch(block + size_t(j) * stride + ahead);
    if constexpr (kMinimum) VAI_UNROLL for (int j = 0; j < NB; ++j) V::prefetch(block + size_t(j) * stride + 64 + ahead);
    group(0);
    if (k > kGroup) group(1);
  }
  VAI_UNROLL for (int r = 0; r < R; ++r)
    VAI_UNROLL for (int j = 0; j < NB; ++j)
      VAI_UNROLL for (int h = 0; h < H; ++h) V::store(t.out + r * kScratchWidth + j * 16 + h * W, acc[r][j][h]);
}

// The 6-bit scales and minimums of Q4_K and Q5_K as bytes: [8 groups][16 rows] of each.
template <class V>
void six_bit_scales(const uint8_t* block, int8_t* scales, int8_t* minimums) {
  using I = typename V::I;
  const I low = V::iset1(0x0f0f0f0f), high = V::iset1(0x30303030);
  for (int i = 0; i < 64; i += 4 * V::kLanes) {
    const I first = V::load_line(block + 64 + i), second = V::load_line(block + 128 + i), above = V::load_line(block + 192 + i);
    auto join = [&](I four, I two) { return V::ior(V::iand(four, low), V::iand(two, high)); };
    V::store_line(scales + i, join(first, V::template shifted<4>(above)));
    V::store_line(scales + 64 + i, join(second, above));
    V::store_line(minimums + i, join(V::template shifted<-4>(first), V::template shifted<2>(above)));
    V::store_line(minimums + 64 + i, join(V::template shifted<-4>(second), V::template shifted<-2>(above)));
  }
}

// Groups of 256 with integer scales of 32 columns (Q4_K, Q5_K: and minimums) or of 16 (Q6_K): integers to the end.
template <class V, BlockType T, int R, int NB>
__attribute__((noinline)) void wide_tile(const TileArgs& t) {
  using F = typename V::F;
  using I = typename V::I;
  constexpr Layout kL = layout(T);
  constexpr int W = V::kLanes, H = 16 / W, kLineBytes = 4 * W;
  constexpr bool kMinimum = T != BlockType::kQ6_K;
  constexpr int kSpan = kMinimum ? 32 : 16, kSpans = kWideGroup / kSpan;  // columns that share an integer scale
  constexpr int kLines = kSpan / 8;
  constexpr int kRun = V::dot4_columns(kL.bits) < kSpan ? V::dot4_columns(kL.bits) / 8 : kLines;
  const uint8_t *block = t.weight, *record = t.packed;
  const size_t stride = t.stride, ahead = t.ahead;
  F acc[R][NB][H];
  VAI_UNROLL for (int r = 0; r < R; ++r)
    VAI_UNROLL for (int j = 0; j < NB; ++j)
      VAI_UNROLL for (int h = 0; h < H; ++h) acc[r][j][h] = V::set1(0.0f);
  for (int k = t.columns; k > 0; k -= kWideGroup, block += kL.bytes, record += R * record_bytes(kWideGroup)) {
    const int8_t* codes = (const int8_t*)record;
    const float* scales = (const float*)(record + R * 256);
    const int32_t* sums = (const int32_t*)(record + R * (kMinimum ? 260 : 276));
    alignas(64) int8_t unpacked[NB][2][128];
    const int8_t *factors[NB], *with_sums[NB];  // [kSpans][16 rows]; what the sums of the activations are multiplied with
    VAI_UNROLL for (int j = 0; j < NB; ++j) {
      const uint8_t* head = block + size_t(j) * stride;
      VAI_UNROLL for (int line = 0; line < kL.lines; line += 64) V::prefetch(head + line + ahead);
      if constexpr (kMinimum) {
        six_bit_scales<V>(head, unpacked[j][0], unpacked[j][1]);
        factors[j] = unpacked[j][0];
        with_sums[j] = unpacked[j][1];
      } else {
        factors[j] = with_sums[j] = (const int8_t*)head + 64;
      }
    }
    VAI_ROLLED for (int h = 0; h < H; ++h) {
      I total[R][NB], offset[R][NB], above[NB];
      VAI_UNROLL for (int r = 0; r < R; ++r)
        VAI_UNROLL for (int j = 0; j < NB; ++j) total[r][j] = offset[r][j] = V::iset1(0);
      VAI_ROLLED for (int g = 0; g < kSpans; ++g) {
        const int8_t* a = codes + g * kSpan / 32 * R * 32 + g * kSpan % 32;
        typename V::Dot4 dot[R][NB];
        if constexpr (kL.high != 0)
          VAI_UNROLL for (int j = 0; j < NB; ++j) {
            const uint8_t* line = block + size_t(j) * stride + kL.high + g * 64 + h * kLineBytes;
            V::prefetch(line + ahead);
            above[j] = V::load_line(line);
          }
        VAI_UNROLL for (int l = 0; l < kLines; ++l) {
          typename V::Nibbles w[NB];
          VAI_UNROLL for (int j = 0; j < NB; ++j) {
            const uint8_t* line = block + size_t(j) * stride + kL.lines + (g * kLines + l) * 64 + h * kLineBytes;
            V::prefetch(line + ahead);
            w[j] = codes_of<V, kL.bits>(line, above[j], l);
          }
          VAI_UNROLL for (int r = 0; r < R; ++r)
            VAI_UNROLL for (int j = 0; j < NB; ++j) {
              const int8_t* mine = a + r * 32 + 8 * l;
              dot[r][j] = l % kRun == 0 ? V::dot4(w[j], mine) : V::dot4(dot[r][j], w[j], mine);
            }
          if ((l + 1) % kRun == 0)
            VAI_UNROLL for (int j = 0; j < NB; ++j) {
              const I factor = V::factor(factors[j] + g * 16 + h * W);
              VAI_UNROLL for (int r = 0; r < R; ++r) total[r][j] = V::dot4_times(total[r][j], dot[r][j], factor);
            }
        }
      }
      VAI_ROLLED for (int i = 0; i < kSpans / 2; ++i)
        VAI_UNROLL for (int j = 0; j < NB; ++j) {
          const int8_t* even = with_sums[j] + 2 * i * 16 + h * W;
          const auto pairs = V::pairs(even, even + 16);
          VAI_UNROLL for (int r = 0; r < R; ++r) offset[r][j] = V::dot_pairs(offset[r][j], pairs, sums[i * R + r]);
        }
      VAI_UNROLL for (int j = 0; j < NB; ++j) {
        const uint8_t* head = block + size_t(j) * stride + h * W * 2;
        const F scale = V::load_f16(head);
        VAI_UNROLL for (int r = 0; r < R; ++r) {
          const F mine = V::set1(scales[r]);
          F product;
          if constexpr (kMinimum) {
            const F minimum = V::mul(V::to_float(offset[r][j]), V::mul(V::load_f16(head + 32), mine));
            product = V::sub(V::mul(V::to_float(total[r][j]), V::mul(scale, mine)), minimum);
          } else {  // code 32 is weight 0
            const I centred = V::isub(total[r][j], V::template shifted<5>(offset[r][j]));
            product = V::mul(V::to_float(centred), V::mul(scale, mine));
          }
          acc[r][j][h] = V::accumulate(acc[r][j][h], product);
        }
      }
    }
  }
  VAI_UNROLL for (int r = 0; r < R; ++r)
    VAI_UNROLL for (int j = 0; j < NB; ++j)
      VAI_UNROLL for (int h = 0; h < H; ++h) V::store(t.out + r * kScratchWidth + j * 16 + h * W, acc[r][j][h]);
}

template <class V, BlockType T, int R, int NB>
__attribute__((noinline)) void float_tile(const TileArgs& t) {
  using F = typename V::F;
  constexpr int W = V::kLanes, H = 16 / W;
  F acc[R][NB][H];
  VAI_UNROLL for (int r = 0; r < R; ++r)
    VAI_UNROLL for (int j = 0; j < NB; ++j)
      VAI_UNROLL for (int h = 0; h < H; ++h) acc[r][j][h] = V::set1(0.0f);
  auto step = [&](int r, int j, int h, int k, F w) __attribute__((always_inline)) {
    acc[r][j][h] = V::accumulate(acc[r][j][h], V::mul(V::set1(t.x[size_t(r) * t.ldx + size_t(k)]), w));
  };
  if constexpr (T == BlockType::kF32) {
    const uint8_t* line = t.weight;
    for (int k = 0; k < t.columns; ++k, line += 64)
      VAI_UNROLL for (int j = 0; j < NB; ++j) {
        V::prefetch(line + size_t(j) * t.stride + t.ahead);
        VAI_UNROLL for (int h = 0; h < H; ++h) {
          const F w = V::load((const float*)(line + size_t(j) * t.stride + h * W * 4));
          VAI_UNROLL for (int r = 0; r < R; ++r) step(r, j, h, k, w);
        }
      }
  } else {
    const uint8_t* line = t.weight;
    auto pair = [&](int k, bool whole) __attribute__((always_inline)) {
      VAI_UNROLL for (int j = 0; j < NB; ++j) {
        V::prefetch(line + size_t(j) * t.stride + t.ahead);
        VAI_UNROLL for (int h = 0; h < H; ++h) {
          F even, odd;
          if constexpr (T == BlockType::kF16)
            V::f16_pairs(line + size_t(j) * t.stride + h * W * 4, even, odd);
          else
            V::bf16_pairs(line + size_t(j) * t.stride + h * W * 4, even, odd);
          VAI_UNROLL for (int r = 0; r < R; ++r) step(r, j, h, k, even);
          if (whole) VAI_UNROLL for (int r = 0; r < R; ++r) step(r, j, h, k + 1, odd);
        }
      }
    };
    int k = 0;
    for (; k + 1 < t.columns; k += 2, line += 64) pair(k, true);
    if (k < t.columns) pair(k, false);
  }
  VAI_UNROLL for (int r = 0; r < R; ++r)
    VAI_UNROLL for (int j = 0; j < NB; ++j)
      VAI_UNROLL for (int h = 0; h < H; ++h) V::store(t.out + r * kScratchWidth + j * 16 + h * W, acc[r][j][h]);
}

template <class V, BlockType T, int NB, int R = V::kMaxRows>
void tile_of_rows(int rows, const TileArgs& t) {
  if constexpr (R > 0) {
    if (rows != R) return tile_of_rows<V, T, NB, R - 1>(rows, t);
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
  }
}

// scratch [R][blocks * 16] -> out: + addend, + bias, + residual; gated: act(first block) * second block.
template <class V>
void epilogue(const LinearArgs& a, int first_row, int rows, int block, int blocks, const float* scratch) {
  using F = typename V::F;
  constexpr int W = V::kLanes;
  for (int r = 0; r < rows; ++r) {
    const size_t row = size_t(first_row + r);
    const float* s = scratch + r * kScratchWidth;
    if (a.gated) {
      const float* bias = a.bias ? a.bias + size_t(a.bias_first + block * a.bias_step) * 16 : nullptr;
      for (int h = 0; h < 16; h += W) {
        F gate = V::load(s + h), up = V::load(s + 16 + h);
        if (bias) gate = V::add(gate, V::load(bias + h)), up = V::add(up, V::load(bias + 16 + h));
        V::store(a.out + row * a.ldo + size_t(block) * 16 + h, V::mul(silu<V>(gate), up));
      }
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
        V::store(a.out + row * a.ldo + column + h, y);
      }
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
  float scratch[V::kMaxRows * kScratchWidth];
  for (int m0 = 0; m0 < a.rows; m0 += per_pass) {
    const int m1 = a.rows - m0 < per_pass ? a.rows : m0 + per_pass;
    for (int i = begin; i < end;) {
      const int outputs = a.gated || end - i < wide ? 1 : wide, blocks = a.gated ? 2 : outputs;
      TileArgs t{};
      t.weight = a.weight.block(i);
      t.stride = row_bytes * size_t(a.gated ? 1 : a.weight.step);
      t.columns = a.weight.columns;
      t.ldx = a.ldx;
      for (int r = m0; r < m1; r += row_block) {
        const int rows = m1 - r < row_block ? m1 - r : row_block;
        // One pass over these blocks: prefetch along the stream. Several: the last one fetches the next blocks.
        t.ahead = m1 - m0 <= row_block ? size_t(V::kAhead) : r + rows >= m1 ? row_bytes * size_t(blocks) : 0;
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
