// Many rows without VNNI: where unpacking a line of codes costs as much as multiplying it with a row or two, 256 columns of
// a block are unpacked once for all rows of a pass, into a panel that stays in L1. The sums are those of the tiles, bit for
// bit: integers within a group, and groups in ascending order.
#pragma once

#include "codes.h"

namespace vai {
namespace {

// 256 columns of 16 outputs, 4 columns of each to a line of 64 bytes.
struct Panel {
  alignas(64) uint8_t codes[kWideGroup * 16];       // as they are multiplied: IQ4 as signed numbers
  alignas(64) uint8_t magnitudes[kWideGroup * 16];  // of IQ4
  alignas(64) float scales[kWideGroup / kGroup][16], minimums[16];  // groups of 256 have one scale
  alignas(64) uint8_t factors[16][64];  // integer scales of a span's columns, as they are multiplied
  alignas(64) uint8_t pairs[8][64];     // what sums of the activations of two spans are multiplied with
};

struct PanelArgs {
  const Panel& panel;
  int columns;
  const uint8_t* packed;
  float* out;  // [rows][kScratchWidth], added to
};

// Lines of four columns from the nibble lines at `block`; `high`: what stands above them. 32 columns, of Q6_K 16.
template <class V, BlockType T>
void unpack_lines(const uint8_t* block, const uint8_t* high, uint8_t* codes, uint8_t* magnitudes) {
  constexpr Layout kL = layout(T);
  constexpr int W = V::kLanes, H = 16 / W, kLineBytes = 4 * W;
  [[maybe_unused]] const auto table = table_of<V, T>();
  VAI_UNROLL for (int h = 0; h < H; ++h) {
    typename V::I above{};
    if constexpr (kL.high != 0) above = V::load_line(high + h * kLineBytes);
    VAI_UNROLL for (int l = 0; l < (kL.bits == 6 ? 2 : 4); ++l) {
      const int at = l * 128 + h * kLineBytes;
      auto w = codes_of<V, kL.bits>(block + l * 64 + h * kLineBytes, above, l);
      if constexpr (is_wide(T)) {
        w = V::look_up_wide(w, table);
        V::store_line(magnitudes + at, V::magnitude(w.low));
        V::store_line(magnitudes + at + 64, V::magnitude(w.high));
      }
      V::store_line(codes + at, w.low);
      V::store_line(codes + at + 64, w.high);
    }
  }
}

template <class V>
void unpack_narrow(const uint8_t* block, int columns, Panel& p) {
  constexpr Layout kL = layout(BlockType::kIQ4_NL);
  for (int g = 0; g < columns / kGroup; ++g) {
    const uint8_t* head = block + g / 2 * kL.bytes;
    const int half = g % 2, at = g * kGroup * 16;
    unpack_lines<V, BlockType::kIQ4_NL>(head + kL.lines + half * 256, nullptr, p.codes + at, p.magnitudes + at);
    for (int n = 0; n < 16; n += V::kLanes) V::store(p.scales[g] + n, V::load_f16(head + half * 32 + n * 2));
  }
}

template <class V, BlockType T>
void unpack_wide(const uint8_t* block, Panel& p) {
  constexpr Layout kL = layout(T);
  constexpr bool kMinimum = T == BlockType::kQ4_K || T == BlockType::kQ5_K;
  constexpr int W = V::kLanes, kSpan = T == BlockType::kQ6_K ? 16 : 32, kSpans = kWideGroup / kSpan;
  for (int s = 0; s < kSpans; ++s) {
    const int at = s * kSpan * 16;
    unpack_lines<V, T>(block + kL.lines + s * kSpan * 8, block + kL.high + s * 64, p.codes + at, p.magnitudes + at);
  }
  alignas(64) int8_t unpacked[2][128];
  const int8_t *factors = unpacked[0], *with_sums = unpacked[1];
  if constexpr (kMinimum)
    six_bit_scales<V>(block, unpacked[0], unpacked[1]);
  else if constexpr (is_wide(T))
    signed_six_bits(block, unpacked[0]);
  else
    factors = with_sums = (const int8_t*)block + 64;
  for (int n = 0; n < 16; n += W) {
    for (int s = 0; s < kSpans; ++s)
      V::store_line(p.factors[s] + n * 4, is_wide(T) ? V::wide_factor(factors + s * 16 + n) : V::factor(factors + s * 16 + n));
    if constexpr (!is_wide(T))
      for (int s = 0; s < kSpans; s += 2)
        V::store_line(p.pairs[s / 2] + n * 4, V::pairs(with_sums + s * 16 + n, with_sums + s * 16 + 16 + n));
    V::store(p.scales[0] + n, V::load_f16(block + n * 2));
    if constexpr (kMinimum) V::store(p.minimums + n, V::load_f16(block + 32 + n * 2));
  }
}

template <class V, int R>
__attribute__((noinline)) void narrow_panel(const PanelArgs& t) {
  using F = typename V::F;
  using I = typename V::I;
  constexpr int W = V::kLanes, H = 16 / W;
  const uint8_t *line = t.panel.codes, *magnitude = t.panel.magnitudes, *record = t.packed;
  const float* weight_scales = t.panel.scales[0];
  float* const out = t.out;
  for (int k = t.columns; k > 0; k -= kGroup) {
    const int8_t* codes = (const int8_t*)record;
    const float* scales = (const float*)(record + R * 32);
    I dot[R][H];
    VAI_UNROLL for (int l = 0; l < 8; ++l) {
      I w[H], m[H];
      VAI_UNROLL for (int h = 0; h < H; ++h) {
        w[h] = V::load_line(line + l * 64 + h * 4 * W);
        m[h] = V::load_line(magnitude + l * 64 + h * 4 * W);
      }
      VAI_UNROLL for (int r = 0; r < R; ++r) {
        const I a = V::dot8_activations(codes + r * 32 + 4 * l);
        VAI_UNROLL for (int h = 0; h < H; ++h) {
          const I x = V::signed_products(m[h], w[h], a);
          dot[r][h] = l == 0 ? x : V::add_dwords(dot[r][h], x);
        }
      }
    }
    V::fence();
    VAI_UNROLL for (int r = 0; r < R; ++r) {
      const F own = V::set1(scales[r]);
      VAI_UNROLL for (int h = 0; h < H; ++h) {
        const F product = V::mul(V::to_float(dot[r][h]), V::mul(V::load(weight_scales + h * W), own));
        float* const at = out + r * kScratchWidth + h * W;
        V::store(at, V::add(V::load(at), product));
      }
    }
    line += kGroup * 16, magnitude += kGroup * 16, weight_scales += 16, record += R * record_bytes(kGroup);
  }
}

template <class V, BlockType T, int R>
__attribute__((noinline)) void wide_panel(const PanelArgs& t) {
  using F = typename V::F;
  using I = typename V::I;
  constexpr bool kMinimum = T == BlockType::kQ4_K || T == BlockType::kQ5_K, kSigned = is_wide(T);
  constexpr int W = V::kLanes, H = 16 / W, kSpan = T == BlockType::kQ6_K ? 16 : 32, kSpans = kWideGroup / kSpan;
  constexpr int kRun = kSigned ? 8 : V::dot4_columns(layout(T).bits) / 4;
  const Panel& p = t.panel;
  const int8_t* codes = (const int8_t*)t.packed;
  const float* scales = (const float*)(t.packed + R * 256);
  const int32_t* sums = (const int32_t*)(t.packed + R * (kSpan == 32 ? 260 : 276));
  float* const out = t.out;
  I total[R][H];
  VAI_UNROLL for (int r = 0; r < R; ++r)
    VAI_UNROLL for (int h = 0; h < H; ++h) total[r][h] = V::iset1(0);
  const uint8_t* line = p.codes;
  if constexpr (kRun == 2) {
    // Runs so short that a row is done with one before the next row begins: only the totals are kept in registers.
    VAI_ROLLED for (int g = 0; g < kWideGroup / kGroup; ++g, codes += R * 32, line += kGroup * 16)
      VAI_UNROLL for (int run = 0; run < 4; ++run) {
        const uint8_t* factors = p.factors[g * 2 + run / 2];
        I w[2][H];
        VAI_UNROLL for (int l = 0; l < 2; ++l)
          VAI_UNROLL for (int h = 0; h < H; ++h) w[l][h] = V::load_line(line + (run * 2 + l) * 64 + h * 4 * W);
        VAI_UNROLL for (int r = 0; r < R; ++r) {
          const I a = V::dot8_activations(codes + r * 32 + 8 * run), b = V::dot8_activations(codes + r * 32 + 8 * run + 4);
          VAI_UNROLL for (int h = 0; h < H; ++h) {
            const I dot = V::add_words(V::products(w[0][h], a), V::products(w[1][h], b));
            total[r][h] = V::dot4_times(total[r][h], dot, V::load_line(factors + h * 4 * W));
          }
        }
      }
  } else {
    alignas(64) int32_t parked[R][16] = {};  // the totals, as the sums of a span need the registers
    const uint8_t* magnitude = p.magnitudes;
    VAI_ROLLED for (int g = 0; g < kSpans; ++g, codes += R * 32, line += kGroup * 16, magnitude += kGroup * 16) {
      const uint8_t* factors = p.factors[g];
      I dot[R][H], part[R][H];
      VAI_UNROLL for (int l = 0; l < 8; ++l) {
        I w[H], m[H];
        VAI_UNROLL for (int h = 0; h < H; ++h) {
          w[h] = V::load_line(line + l * 64 + h * 4 * W);
          if constexpr (kSigned) m[h] = V::load_line(magnitude + l * 64 + h * 4 * W);
        }
        VAI_UNROLL for (int r = 0; r < R; ++r) {
          const I a = V::dot8_activations(codes + r * 32 + 4 * l);
          VAI_UNROLL for (int h = 0; h < H; ++h) {
            if constexpr (kSigned) {
              const I x = V::signed_products(m[h], w[h], a);
              dot[r][h] = l == 0 ? x : V::add_dwords(dot[r][h], x);
            } else {
              const I x = V::products(w[h], a);
              dot[r][h] = l % kRun == 0 ? x : V::add_words(dot[r][h], x);
              if ((l + 1) % kRun == 0) {
                const I so_far = l + 1 == kRun ? V::iset1(0) : part[r][h];
                part[r][h] = V::dot4_times(so_far, dot[r][h], V::load_line(factors + h * 4 * W));
              }
            }
          }
        }
      }
      V::fence();
      VAI_UNROLL for (int r = 0; r < R; ++r)
        VAI_UNROLL for (int h = 0; h < H; ++h) {
          int32_t* const at = parked[r] + h * W;
          if constexpr (kSigned)
            V::store_line(at, V::wide_times(V::load_line(at), dot[r][h], V::load_line(factors + h * 4 * W)));
          else
            V::store_line(at, V::iadd(V::load_line(at), part[r][h]));
        }
      V::fence();
    }
    VAI_UNROLL for (int r = 0; r < R; ++r)
      VAI_UNROLL for (int h = 0; h < H; ++h) total[r][h] = V::load_line(parked[r] + h * W);
  }
  VAI_UNROLL for (int h = 0; h < H; ++h) {
    I offset[R];
    VAI_UNROLL for (int r = 0; r < R; ++r) offset[r] = V::iset1(0);
    if constexpr (!kSigned) VAI_ROLLED for (int i = 0; i < kSpans / 2; ++i) {
      const I pairs = V::load_line(p.pairs[i] + h * 4 * W);
      VAI_UNROLL for (int r = 0; r < R; ++r) offset[r] = V::dot_pairs(offset[r], pairs, sums[i * R + r]);
    }
    const F scale = V::load(p.scales[0] + h * W);
    VAI_UNROLL for (int r = 0; r < R; ++r) {
      const F own = V::set1(scales[r]);
      F product;
      if constexpr (kMinimum) {
        const F minimum = V::mul(V::to_float(offset[r]), V::mul(V::load(p.minimums + h * W), own));
        product = V::sub(V::mul(V::to_float(total[r][h]), V::mul(scale, own)), minimum);
      } else {
        const I centred = kSigned ? total[r][h] : V::isub(total[r][h], V::template shifted<5>(offset[r]));
        product = V::mul(V::to_float(centred), V::mul(scale, own));
      }
      float* const at = out + r * kScratchWidth + h * W;
      V::store(at, V::add(V::load(at), product));
    }
  }
}

template <class V, BlockType T, int R = V::kMaxRows>
void panel_of_rows(int rows, const PanelArgs& t) {
  if constexpr (R > 0) {
    if (rows != R) return panel_of_rows<V, T, R - 1>(rows, t);
    if constexpr (layout(T).group == kWideGroup)
      wide_panel<V, T, R>(t);
    else
      narrow_panel<V, R>(t);
  }
}

// Rows [first, end) of one block of outputs at `weight` -> sums [end - first][kScratchWidth].
template <class V, BlockType T>
void panel_rows(const LinearArgs& a, int first, int end, const uint8_t* weight, float* sums) {
  constexpr Layout kL = layout(T);
  const int row_block = V::row_block(a.rows);
  const size_t packed_bytes = packed_row_bytes(kL.group, a.weight.columns);
  Panel panel;
  for (int r = 0; r < end - first; ++r)
    for (int n = 0; n < 16; n += V::kLanes) V::store(sums + r * kScratchWidth + n, V::set1(0.0f));
  for (int k = 0; k < a.weight.columns; k += kWideGroup) {
    const int columns = a.weight.columns - k < kWideGroup ? a.weight.columns - k : kWideGroup;
    const uint8_t* block = weight + size_t(k / kL.columns) * size_t(kL.bytes);
    if constexpr (kL.group == kWideGroup)
      unpack_wide<V, T>(block, panel);
    else
      unpack_narrow<V>(block, columns, panel);
    // What is unpacked next stands behind this, of the next outputs too; its lines are fetched a few with each tile.
    const int bytes = kL.bytes * (kWideGroup / kL.columns), tiles = (end - first + row_block - 1) / row_block;
    const int each = (bytes / 64 + tiles - 1) / tiles * 64;
    const uint8_t *next = block + bytes, *const past = next + bytes;
    for (int r = first; r < end; r += row_block) {
      for (const uint8_t* const stop = next + each; next < stop && next < past; next += 64) V::prefetch(next);
      const int rows = end - r < row_block ? end - r : row_block;
      const size_t record = size_t(k / kL.group) * size_t(record_bytes(kL.group)) * size_t(rows);
      panel_of_rows<V, T>(rows, {panel, columns, a.packed + size_t(r) * packed_bytes + record, sums + (r - first) * kScratchWidth});
    }
  }
}

template <class V>
void panel_rows(const LinearArgs& a, int first, int end, const uint8_t* weight, float* sums) {
  switch (a.weight.type) {
    case BlockType::kQ4_K: return panel_rows<V, BlockType::kQ4_K>(a, first, end, weight, sums);
    case BlockType::kQ5_K: return panel_rows<V, BlockType::kQ5_K>(a, first, end, weight, sums);
    case BlockType::kQ6_K: return panel_rows<V, BlockType::kQ6_K>(a, first, end, weight, sums);
    case BlockType::kIQ4_NL: return panel_rows<V, BlockType::kIQ4_NL>(a, first, end, weight, sums);
    case BlockType::kIQ4_XS: return panel_rows<V, BlockType::kIQ4_XS>(a, first, end, weight, sums);
    default: return;  // panels_pay says no
  }
}

}  // namespace
}  // namespace vai
