// Linear layers of the exact kind with AMX: integer sums of 16 rows at a time, in tiles. What becomes of the sums is what
// AVX-512 makes of them, which has few rows and float weights to itself.
//
// Codes are made signed bytes for 256 columns of a block, which stay in L1 while the rows pass by. A tile's sums are stored
// and read again row by row: the next span's product is under way meanwhile.
#include "vai/vec_avx512.h"

#include "ops/fast/tile_instructions.h"
#include "ops/linear/linear_impl.h"

namespace vai {

void linear_avx512(const LinearArgs&, int begin, int end);

namespace {

using V = Avx512Vec;
using F = V::F;
using I = V::I;

constexpr int kTileRows = 16;
constexpr int kChunk = kWideGroup;  // columns that are unpacked at once
constexpr size_t kPanelBytes = size_t(kChunk) * 16;

// Tiles 0 and 1 are sums of 16 rows, 2 their activations, 3 weights; 4, 5 and 6 are the first three of the rows that are left. More
// of them would be no faster (see multiply_tiles in ops/fast/amx.cc). `columns`: over which they are multiplied.
void configure(int rest, int columns) {
  alignas(64) uint8_t config[64] = {1};
  for (int tile = 0; tile < 7; ++tile) {
    if (tile > 3 && rest == 0) continue;
    config[16 + 2 * tile] = uint8_t(tile == 2 || tile == 6 ? columns : 64);
    config[48 + tile] = uint8_t(tile == 3 ? columns / 4 : tile > 3 ? rest : kTileRows);
  }
  load_config(config);
}

// ---- codes as signed bytes, [columns / 4][16 rows][4]

template <BlockType T>
inline __attribute__((always_inline)) I centred(I codes) {
  if constexpr (T == BlockType::kQ4_0) return _mm512_sub_epi8(codes, _mm512_set1_epi8(8));
  if constexpr (T == BlockType::kQ5_0) return _mm512_sub_epi8(codes, _mm512_set1_epi8(16));
  if constexpr (T == BlockType::kQ6_K) return _mm512_sub_epi8(codes, _mm512_set1_epi8(32));
  if constexpr (is_wide(T)) return _mm512_shuffle_epi8(V::small(kIq4Values), codes);
  if constexpr (T == BlockType::kMXFP4) return _mm512_shuffle_epi8(V::small(kMxfp4Values), codes);
  return codes;
}

// Stored blocks for up to kChunk columns.
template <BlockType T>
void unpack(const uint8_t* block, int columns, uint8_t* panel) {
  constexpr Layout kL = layout(T);
  constexpr int kLines = kL.bits == 8 ? 8 : 4;
  for (int k = 0; k < columns; block += kL.bytes)
    VAI_ROLLED for (int g = 0; g < kL.columns / 32 && k < columns; ++g, k += 32) {
      I above = V::iset1(0);
      if constexpr (kL.high != 0) above = V::load_line(block + kL.high + g * 64);
      VAI_UNROLL for (int l = 0; l < kLines; ++l, panel += kL.bits == 8 ? 64 : 128) {
        const uint8_t* line = block + kL.lines + (g * kLines + l) * 64;
        if constexpr (kL.bits == 8) {
          V::store_line(panel, _mm512_xor_si512(V::load_line(line), V::iset1(int(0x80808080u))));
        } else {
          const V::Nibbles codes = codes_of<V, kL.bits>(line, above, l);
          V::store_line(panel, centred<T>(codes.low)), V::store_line(panel + 64, centred<T>(codes.high));
        }
      }
    }
}

// ---- rows

// Starts the integer sums of one span, 32 columns. `stride`: bytes from the codes of a row to those of the next one.
template <bool kWhole>
inline __attribute__((always_inline)) void start(const uint8_t* codes, size_t stride, const uint8_t* panel, int32_t* sums) {
  constexpr int kSums = kWhole ? 0 : 4, kCodes = kWhole ? 2 : 6;
  zero<kSums>();
  load<3>(panel, 64);
  load<kCodes>(codes, stride);
  dot<kSums, kCodes, 3>();
  store<kSums>(sums, 64);
}

// Weights that will be unpacked soon: a piece of them is fetched with each span.
struct Ahead {
  const uint8_t* weights;
  size_t piece;  // bytes, 0 for none

  inline __attribute__((always_inline)) void fetch(int g) const {
    for (size_t line = 0; line < piece; line += 64) V::prefetch(weights + size_t(g) * piece + line);
  }
};

// Calls part(g, sums) for all spans, whose sums [rows][16] are ready then; that of the next span has been started.
// `codes_at(g)`: where the codes of span g are.
template <bool kWhole, class Codes, class Part>
inline __attribute__((always_inline)) void each_span(Codes&& codes_at, size_t stride, const uint8_t* panel, int spans, const Ahead& ahead,
                                                     Part&& part) {
  alignas(64) int32_t sums[2][kTileRows * 16];
  auto begin = [&](int g) __attribute__((always_inline)) { start<kWhole>(codes_at(g), stride, panel + size_t(g) * 512, sums[g % 2]); };
  begin(0);
  for (int g = 0; g < spans; g += 2) {
    if (g + 1 < spans) begin(g + 1);
    ahead.fetch(g);
    part(g, sums[0]);
    if (g + 1 == spans) return;
    if (g + 2 < spans) begin(g + 2);
    ahead.fetch(g + 1);
    part(g + 1, sums[1]);
  }
}

// Up to `columns` of one block under `rows` rows, R of them if that is not 0, go on from what `out` holds.

// Types with a float scale for each 32 columns.
template <BlockType T, int R>
__attribute__((noinline)) void quantized_rows(const uint8_t* block, const uint8_t* record, const uint8_t* panel, int rows, int columns,
                                              const Ahead& ahead, float* out) {
  constexpr Layout kL = layout(T);
  constexpr bool kMinimum = T == BlockType::kQ4_1 || T == BlockType::kQ5_1;
  const int n = R ? R : rows;
  const size_t step = size_t(n) * size_t(record_bytes(kGroup));
  F acc[R ? R : 1];
  if constexpr (R != 0) VAI_UNROLL for (int r = 0; r < R; ++r) acc[r] = V::load(out + r * kScratchWidth);
  auto part = [&](int g, const int32_t* sums) __attribute__((always_inline)) {
    const uint8_t* const head = block + size_t(g / 2) * kL.bytes;
    const uint8_t* const tail = record + size_t(g) * step + n * 32;
    const float* const scales = (const float*)tail;
    const int32_t* const totals = (const int32_t*)(tail + n * 4);
    const F scale = T == BlockType::kMXFP4 ? V::load_e8m0(head + g % 2 * 16) : V::load_f16(head + g % 2 * 32);
    F minimum{};
    if constexpr (kMinimum) minimum = V::load_f16(head + 64 + g % 2 * 32);
    auto row = [&](int r, F sum) __attribute__((always_inline)) {
      const F own = V::set1(scales[r]);
      F product = V::mul(V::to_float(V::load_line(sums + r * 16)), V::mul(scale, own));
      if constexpr (kMinimum) product = V::add(product, V::mul(V::set1(float(totals[r])), V::mul(minimum, own)));
      return V::accumulate(sum, product);
    };
    if constexpr (R != 0)
      VAI_UNROLL for (int r = 0; r < R; ++r) acc[r] = row(r, acc[r]);
    else
      for (int r = 0; r < n; ++r) V::store(out + r * kScratchWidth, row(r, V::load(out + r * kScratchWidth)));
  };
  each_span<R != 0>([&](int g) { return record + size_t(g) * step; }, kGroup, panel, columns / kGroup, ahead, part);
  if constexpr (R != 0) VAI_UNROLL for (int r = 0; r < R; ++r) V::store(out + r * kScratchWidth, acc[r]);
}

// What is read of a block with integer scales before its codes.
struct Head {
  F scale, minimum;
  I pairs[kWideGroup / 64];         // minimums of 32 columns
  alignas(64) int8_t factors[256];  // [spans][16], and minimums behind them
};

constexpr bool has_minimum(BlockType t) { return t == BlockType::kQ4_K || t == BlockType::kQ5_K; }

template <BlockType T>
inline __attribute__((always_inline)) void read_head(const uint8_t* block, Head& head) {
  head.scale = V::load_f16(block);
  if constexpr (T == BlockType::kQ6_K)
    VAI_UNROLL for (int i = 0; i < 256; i += 64) V::store_line(head.factors + i, V::load_line(block + 64 + i));
  if constexpr (is_wide(T)) signed_six_bits(block, head.factors);
  if constexpr (has_minimum(T)) {
    const int8_t* const minimums = head.factors + 128;
    six_bit_scales<V>(block, head.factors, head.factors + 128);
    head.minimum = V::load_f16(block + 32);
    VAI_UNROLL for (int i = 0; i < kWideGroup / 64; ++i) head.pairs[i] = V::pairs(minimums + 2 * i * 16, minimums + 2 * i * 16 + 16);
  }
}

// What row r of a record of `rows` has of a block whose integer sums are `total`.
template <BlockType T>
inline __attribute__((always_inline)) F scaled(const Head& head, const uint8_t* record, int rows, int r, I total) {
  const F own = V::set1(((const float*)(record + rows * 256))[r]);
  const F product = V::mul(V::to_float(total), V::mul(head.scale, own));
  if constexpr (!has_minimum(T)) return product;
  const int32_t* const of32 = (const int32_t*)(record + rows * 260) + r;
  I offset = V::iset1(0);
  VAI_UNROLL for (int i = 0; i < kWideGroup / 64; ++i) offset = V::dot_pairs(offset, head.pairs[i], of32[i * rows]);
  return V::sub(product, V::mul(V::to_float(offset), V::mul(head.minimum, own)));
}

// Types with integer scales of 32 columns: all 256 columns.
template <BlockType T, int R>
__attribute__((noinline)) void wide_rows(const uint8_t* block, const uint8_t* record, const uint8_t* panel, int rows, const Ahead& ahead,
                                         float* out) {
  const int n = R ? R : rows;
  Head head;
  read_head<T>(block, head);
  I total[R ? R : kTileRows];
  VAI_UNROLL for (int r = 0; r < (R ? R : kTileRows); ++r) total[r] = V::iset1(0);
  auto part = [&](int g, const int32_t* sums) __attribute__((always_inline)) {
    const I factor = V::factor(head.factors + g * 16);
    if constexpr (R != 0)
      VAI_UNROLL for (int r = 0; r < R; ++r) total[r] = V::dot4_times(total[r], V::load_line(sums + r * 16), factor);
    else
      for (int r = 0; r < n; ++r) total[r] = V::dot4_times(total[r], V::load_line(sums + r * 16), factor);
  };
  each_span<R != 0>([&](int g) { return record + wide_codes(n, 0, g); }, 64, panel, kWideGroup / 32, ahead, part);
  auto row = [&](int r) __attribute__((always_inline)) {
    float* const own = out + r * kScratchWidth;
    V::store(own, V::add(V::load(own), scaled<T>(head, record, n, r, total[r])));
  };
  if constexpr (R != 0)
    VAI_UNROLL for (int r = 0; r < R; ++r) row(r);
  else
    for (int r = 0; r < n; ++r) row(r);
}

template <BlockType T>
void multiply(const uint8_t* block, const uint8_t* record, const uint8_t* panel, int rows, int columns, const Ahead& ahead, float* out) {
  const bool whole = rows == kTileRows;
  if constexpr (layout(T).group == kWideGroup)
    (whole ? wide_rows<T, kTileRows> : wide_rows<T, 0>)(block, record, panel, rows, ahead, out);
  else
    (whole ? quantized_rows<T, kTileRows> : quantized_rows<T, 0>)(block, record, panel, rows, columns, ahead, out);
}

// Rows [m0, m1) under one row of blocks.
template <BlockType T>
void tiled(const LinearArgs& a, int m0, int m1, const uint8_t* block, uint8_t* panel, float* sums) {
  constexpr Layout kL = layout(T);
  constexpr size_t kChunkBytes = size_t(kChunk / kL.columns) * size_t(kL.bytes);
  const size_t row_bytes = packed_row_bytes(kL.group, a.weight.columns);
  for (int m = m0; m < m1; ++m) V::store(sums + (m - m0) * kScratchWidth, V::set1(0.0f));
  for (int k = 0; k < a.weight.columns; k += kChunk, block += kChunkBytes) {
    const int columns = a.weight.columns - k < kChunk ? a.weight.columns - k : kChunk;
    const Ahead ahead{block + 2 * a.ahead,  // a chunk is unpacked at once: it has to be there as a whole
                      kChunkBytes / (kChunk / 32)};
    unpack<T>(block, columns, panel);
    for (int m = m0; m < m1; m += kTileRows) {
      const int rows = m1 - m < kTileRows ? m1 - m : kTileRows;
      const uint8_t* record = a.packed + size_t(m) * row_bytes + size_t(k / kL.group) * size_t(rows) * size_t(record_bytes(kL.group));
      multiply<T>(block, record, panel, rows, columns, m == m0 ? ahead : Ahead{}, sums + (m - m0) * kScratchWidth);
    }
  }
}

// ---- integer scales, folded into the codes

// A code times its scale needs more bits than a byte has: it is (above << kFold) + below, bytes in two panels. So a block has all its
// integer sums in two tiles, and nothing is left to be done for each scale. Unsigned codes of up to five bits are multiplied with the
// upper and with the lower three bits of a scale that has six; of signed codes the product is cut in two.
constexpr bool is_cut(BlockType t) { return t == BlockType::kQ6_K || t == BlockType::kIQ4_XS; }

// Whether that pays: panels that are made for so many rows cost less than scales for each of them, and where there is a scale for
// 16 columns of a tile's 64 they always do.
constexpr int kFoldedRows = 64;
constexpr bool is_folded(BlockType t, int rows) { return layout(t).group == kWideGroup && (t == BlockType::kQ6_K || rows >= kFoldedRows); }

struct Panels {
  alignas(64) uint8_t above[kPanelBytes], below[kPanelBytes];
};

template <BlockType T>
__attribute__((noinline)) void fold(const uint8_t* block, Head& head, Panels& panels) {
  constexpr Layout kL = layout(T);
  constexpr int kSpan = T == BlockType::kQ6_K ? 16 : 32, kLines = kSpan / 8;
  read_head<T>(block, head);
  uint8_t *above = panels.above, *below = panels.below;
  auto twice = [](I x) { return V::ior(V::iand(x, V::iset1(0xffff)), V::shifted<16>(x)); };
  VAI_ROLLED for (int g = 0; g < kWideGroup / kSpan; ++g) {
    const I factor = V::factor(head.factors + g * 16);
    const I whole = twice(factor), upper = twice(V::shifted<-3>(factor)), lower = twice(V::iand(factor, V::iset1(7)));
    auto put = [&](I codes) __attribute__((always_inline)) {
      if constexpr (is_cut(T)) {
        const I even = _mm512_mullo_epi16(_mm512_srai_epi16(_mm512_slli_epi16(codes, 8), 8), whole);
        const I odd = _mm512_mullo_epi16(_mm512_srai_epi16(codes, 8), whole);
        const I first = V::iset1(0x00ff00ff);  // the ternary function is first ? even : odd
        V::store_line(above, _mm512_ternarylogic_epi32(first, _mm512_srai_epi16(even, 6), _mm512_slli_epi16(odd, 2), 0xca));
        V::store_line(below, V::iand(_mm512_ternarylogic_epi32(first, even, _mm512_slli_epi16(odd, 8), 0xca), V::iset1(0x3f3f3f3f)));
      } else {  // no product has more than eight bits: two bytes are multiplied as one number of sixteen
        V::store_line(above, _mm512_mullo_epi16(codes, upper));
        V::store_line(below, _mm512_mullo_epi16(codes, lower));
      }
      above += 64, below += 64;
    };
    I over = V::iset1(0);
    if constexpr (kL.high != 0) over = V::load_line(block + kL.high + g * 64);
    VAI_UNROLL for (int l = 0; l < kLines; ++l) {
      const V::Nibbles codes = codes_of<V, kL.bits>(block + kL.lines + (g * kLines + l) * 64, over, l);
      put(centred<T>(codes.low)), put(centred<T>(codes.high));
    }
  }
}

// Starts the integer sums of the rows of a record: [above, below][rows][16].
template <BlockType T, bool kWhole>
inline __attribute__((always_inline)) void start(const uint8_t* record, int rows, const Panels& panels, int32_t* sums) {
  constexpr int kAbove = kWhole ? 0 : 4, kBelow = kAbove + 1, kCodes = kWhole ? 2 : 6;
  zero<kAbove>(), zero<kBelow>();
  VAI_UNROLL for (int k = 0; k < kWideGroup; k += 64) {
    load<3>(panels.above + k * 16, 64);
    load<kCodes>(record + k * rows, 64);
    dot<kAbove, kCodes, 3, !is_cut(T)>();
    load<3>(panels.below + k * 16, 64);
    dot<kBelow, kCodes, 3, !is_cut(T)>();
  }
  store<kAbove>(sums, 64), store<kBelow>(sums + kTileRows * 16, 64);
}

// `out` goes on by what the sums stand for.
template <BlockType T>
__attribute__((noinline)) void finish(const Head& head, const uint8_t* record, int rows, const int32_t* sums, float* out) {
  constexpr int kFold = is_cut(T) ? 6 : 3;
  for (int r = 0; r < rows; ++r, sums += 16, out += kScratchWidth) {
    const I total = V::iadd(V::shifted<kFold>(V::load_line(sums)), V::load_line(sums + kTileRows * 16));
    V::store(out, V::add(V::load(out), scaled<T>(head, record, rows, r, total)));
  }
}

// Rows [m0, m1) under one row of blocks. While tiles are multiplied, what was multiplied before them is finished, or the next
// block is folded.
template <BlockType T>
void folded(const LinearArgs& a, int m0, int m1, const uint8_t* block, float* sums) {
  constexpr Layout kL = layout(T);
  const size_t row_bytes = packed_row_bytes(kWideGroup, a.weight.columns);
  const int blocks = a.weight.columns / kWideGroup;
  Panels panels[2];
  Head heads[2];
  alignas(64) int32_t integers[2][2 * kTileRows * 16];
  auto rows_from = [&](int m) { return m1 - m < kTileRows ? m1 - m : kTileRows; };
  auto record_of = [&](int m, int b) {
    return a.packed + size_t(m) * row_bytes + size_t(b * rows_from(m)) * size_t(record_bytes(kWideGroup));
  };
  auto begin = [&](int m, int b) __attribute__((always_inline)) {
    int32_t* const own = integers[(m - m0) / kTileRows % 2];
    if (rows_from(m) == kTileRows)
      start<T, true>(record_of(m, b), kTileRows, panels[b % 2], own);
    else
      start<T, false>(record_of(m, b), rows_from(m), panels[b % 2], own);
  };
  for (int m = 0; m < m1 - m0; ++m) V::store(sums + m * kScratchWidth, V::set1(0.0f));
  fold<T>(block, heads[0], panels[0]);
  for (int b = 0; b < blocks; ++b) {
    block += kL.bytes;
    for (int line = 0; line < kL.bytes; line += 64) V::prefetch(block + kL.bytes + a.ahead + line);
    begin(m0, b);
    for (int m = m0; m < m1; m += kTileRows) {
      if (m + kTileRows < m1)
        begin(m + kTileRows, b);
      else if (b + 1 < blocks)
        fold<T>(block, heads[1 - b % 2], panels[1 - b % 2]);
      finish<T>(heads[b % 2], record_of(m, b), rows_from(m), integers[(m - m0) / kTileRows % 2], sums + (m - m0) * kScratchWidth);
    }
  }
}

// ---- the layer

template <BlockType T>
void multiply_block(const LinearArgs& a, int m0, int m1, const uint8_t* block, uint8_t* panel, float* sums) {
  if constexpr (layout(T).group == kWideGroup)
    if (is_folded(T, a.rows)) return folded<T>(a, m0, m1, block, sums);
  if constexpr (T != BlockType::kQ6_K) tiled<T>(a, m0, m1, block, panel, sums);
}

void multiply_block(const LinearArgs& a, int m0, int m1, const uint8_t* block, uint8_t* panel, float* sums) {
  switch (a.weight.type) {
    case BlockType::kQ4_0: return multiply_block<BlockType::kQ4_0>(a, m0, m1, block, panel, sums);
    case BlockType::kQ8_0: return multiply_block<BlockType::kQ8_0>(a, m0, m1, block, panel, sums);
    case BlockType::kQ4_K: return multiply_block<BlockType::kQ4_K>(a, m0, m1, block, panel, sums);
    case BlockType::kQ5_K: return multiply_block<BlockType::kQ5_K>(a, m0, m1, block, panel, sums);
    case BlockType::kQ6_K: return multiply_block<BlockType::kQ6_K>(a, m0, m1, block, panel, sums);
    case BlockType::kQ4_1: return multiply_block<BlockType::kQ4_1>(a, m0, m1, block, panel, sums);
    case BlockType::kQ5_0: return multiply_block<BlockType::kQ5_0>(a, m0, m1, block, panel, sums);
    case BlockType::kQ5_1: return multiply_block<BlockType::kQ5_1>(a, m0, m1, block, panel, sums);
    case BlockType::kIQ4_NL: return multiply_block<BlockType::kIQ4_NL>(a, m0, m1, block, panel, sums);
    case BlockType::kIQ4_XS: return multiply_block<BlockType::kIQ4_XS>(a, m0, m1, block, panel, sums);
    case BlockType::kMXFP4: return multiply_block<BlockType::kMXFP4>(a, m0, m1, block, panel, sums);
    default: return;
  }
}

}  // namespace

int row_block_amx(int rows) { return rows <= kFewRows ? rows : kTileRows; }

void linear_amx(const LinearArgs& a, int begin, int end) {
  if (!a.packed || a.rows <= kFewRows) return linear_avx512(a, begin, end);
  alignas(64) uint8_t panel[kPanelBytes];
  alignas(64) float sums[kRowsPerPass * kScratchWidth];
  const int rest = a.rows % kTileRows, few = rest <= kFewRows ? rest : 0;
  const size_t row_bytes = packed_row_bytes(layout(a.weight.type).group, a.weight.columns);
  configure(few ? 0 : rest, is_folded(a.weight.type, a.rows) ? 64 : 32);
  for (int m0 = 0; m0 < a.rows; m0 += kRowsPerPass) {
    const int m1 = a.rows - m0 < kRowsPerPass ? a.rows : m0 + kRowsPerPass;
    const int tiled = m1 == a.rows ? m1 - few : m1;
    for (int i = begin; i < end; ++i) {
      for (int j = 0; j < (a.gated ? 2 : 1); ++j) {
        const uint8_t* const block = a.weight.block(i) + size_t(j) * a.weight.row_bytes();
        if (tiled > m0) multiply_block(a, m0, tiled, block, panel, sums + j * 16);
        if (tiled == m1) continue;
        TileArgs t{};
        t.weight = block, t.columns = a.weight.columns, t.ahead = a.ahead;
        t.packed = a.packed + size_t(tiled) * row_bytes;
        t.out = sums + (tiled - m0) * kScratchWidth + j * 16;
        tile<V, 1>(a.weight.type, few, t);
      }
      epilogue<V>(a, m0, m1 - m0, i, 1, sums);
    }
  }
  release();
}

}  // namespace vai
