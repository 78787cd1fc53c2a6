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

template <class V, BlockType T, int R, int NB>
__attribute__((noinline)) void quantized_tile(const TileArgs& t) {
  using F = typename V::F;
  constexpr int W = V::kLanes, H = 16 / W, kLineBytes = 4 * W;
  constexpr bool kNibbles = T == BlockType::kQ4_0;
  constexpr int kLines = kNibbles ? 4 : 8;  // of a group
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
      VAI_UNROLL for (int r = 0; r < R; ++r)
        VAI_UNROLL for (int j = 0; j < NB; ++j)
          dot[r][j] = kNibbles ? V::dot4_begin(-8 * sums[r]) : V::dot8_begin(-128 * sums[r]);
      VAI_UNROLL for (int l = 0; l < kLines; ++l) {
        if constexpr (kNibbles) {
          typename V::Nibbles w[NB];
          VAI_UNROLL for (int j = 0; j < NB; ++j) {
            const uint8_t* line = block + size_t(j) * stride + 64 + (half * kLines + l) * 64 + h * kLineBytes;
            if (h == 0) V::prefetch(line + ahead);
            w[j] = V::nibbles(line);
          }
          VAI_UNROLL for (int r = 0; r < R; ++r)
            VAI_UNROLL for (int j = 0; j < NB; ++j) dot[r][j] = V::dot4(dot[r][j], w[j], codes + r * 32 + 8 * l);
        } else {
          typename V::Bytes w[NB];
          VAI_UNROLL for (int j = 0; j < NB; ++j) {
            const uint8_t* line = block + size_t(j) * stride + 64 + (half * kLines + l) * 64 + h * kLineBytes;
            if (h == 0) V::prefetch(line + ahead);
            w[j] = V::bytes(line);
          }
          VAI_UNROLL for (int r = 0; r < R; ++r)
            VAI_UNROLL for (int j = 0; j < NB; ++j) dot[r][j] = V::dot8(dot[r][j], w[j], codes + r * 32 + 4 * l);
        }
      }
      V::fence();
      VAI_UNROLL for (int j = 0; j < NB; ++j) {
        const F scale = V::load_f16(block + size_t(j) * stride + half * 32 + h * W * 2);
        VAI_UNROLL for (int r = 0; r < R; ++r) {
          const auto sum = kNibbles ? V::dot4_end(dot[r][j], -8 * sums[r]) : V::dot8_end(dot[r][j]);
          acc[r][j][h] = V::accumulate(acc[r][j][h], V::mul(V::to_float(sum), V::mul(scale, V::set1(scales[r]))));
        }
      }
    }
    record += R * kRecordBytes;
  };
  for (int k = t.columns; k > 0; k -= 64, block += block_bytes(T)) {
    VAI_UNROLL for (int j = 0; j < NB; ++j) V::prefetch(block + size_t(j) * stride + ahead);
    group(0);
    if (k > kGroup) group(1);
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
    if constexpr (quantizes(T))
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
  const size_t row_bytes = a.weight.row_bytes(), groups = size_t(a.weight.columns / kGroup);
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
        if (a.packed) t.packed = a.packed + size_t(r) * groups * kRecordBytes;
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
