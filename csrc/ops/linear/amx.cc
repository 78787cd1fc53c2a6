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

constexpr int kTileRows = 16, kFewRows = 8;  // of few rows AVX-512 has all sums in registers
constexpr int kChunk = kWideGroup;           // columns that are unpacked at once
constexpr size_t kPanelBytes = size_t(kChunk) * 16;

constexpr int span_of(BlockType t) { return t == BlockType::kQ6_K ? 16 : 32; }  // columns that share an integer or a float scale

// Tile 0 has sums of 16 rows, 1 their activations, 2 weights; 3 and 4 are sums and activations of the rows that are left. More of
// them would be no faster (see multiply_tiles in ops/fast/amx.cc).
void configure(int rest, int span) {
  alignas(64) uint8_t config[64] = {1};
  for (int tile = 0; tile < 5; ++tile) {
    if (tile > 2 && rest == 0) continue;
    config[16 + 2 * tile] = uint8_t(tile == 1 || tile == 4 ? span : 64);
    config[48 + tile] = uint8_t(tile == 2 ? span / 4 : tile > 2 ? rest : kTileRows);
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
  constexpr int kSpan = span_of(T), kLines = kL.bits == 8 ? kSpan / 4 : kSpan / 8;
  for (int k = 0; k < columns; block += kL.bytes)
    VAI_ROLLED for (int g = 0; g < kL.columns / kSpan && k < columns; ++g, k += kSpan) {
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

// Starts the integer sums of one span.
template <bool kWhole>
inline __attribute__((always_inline)) void start(const uint8_t* codes, const uint8_t* panel, int32_t* sums) {
  constexpr int kSums = kWhole ? 0 : 3, kCodes = kWhole ? 1 : 4;
  zero<kSums>();
  load<2>(panel, 64);
  load<kCodes>(codes, 32);
  dot<kSums, kCodes, 2>();
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
// `codes_at(g)`: where the codes of span g are, [rows][32].
template <bool kWhole, class Codes, class Part>
inline __attribute__((always_inline)) void each_span(Codes&& codes_at, const uint8_t* panel, size_t panel_step, int spans, const Ahead& ahead,
                                                     Part&& part) {
  alignas(64) int32_t sums[2][kTileRows * 16];
  start<kWhole>(codes_at(0), panel, sums[0]);
  for (int g = 0; g < spans; g += 2) {
    if (g + 1 < spans) start<kWhole>(codes_at(g + 1), panel + size_t(g + 1) * panel_step, sums[1]);
    ahead.fetch(g);
    part(g, sums[0]);
    if (g + 1 == spans) return;
    if (g + 2 < spans) start<kWhole>(codes_at(g + 2), panel + size_t(g + 2) * panel_step, sums[0]);
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
  each_span<R != 0>([&](int g) { return record + size_t(g) * step; }, panel, kGroup * 16, columns / kGroup, ahead, part);
  if constexpr (R != 0) VAI_UNROLL for (int r = 0; r < R; ++r) V::store(out + r * kScratchWidth, acc[r]);
}

// Types with integer scales: all 256 columns.
template <BlockType T, int R>
__attribute__((noinline)) void wide_rows(const uint8_t* block, const uint8_t* record, const uint8_t* panel, int rows, const Ahead& ahead,
                                         float* out) {
  constexpr int kSpan = span_of(T), kSpans = kWideGroup / kSpan;
  constexpr bool kMinimum = T == BlockType::kQ4_K || T == BlockType::kQ5_K;
  const int n = R ? R : rows;
  alignas(64) int8_t unpacked[2][128];
  const int8_t* factors = unpacked[0];
  if constexpr (kMinimum) six_bit_scales<V>(block, unpacked[0], unpacked[1]);
  if constexpr (is_wide(T)) signed_six_bits(block, unpacked[0]);
  if constexpr (T == BlockType::kQ6_K) factors = (const int8_t*)block + 64;
  I total[R ? R : kTileRows];
  VAI_UNROLL for (int r = 0; r < (R ? R : kTileRows); ++r) total[r] = V::iset1(0);
  auto part = [&](int g, const int32_t* sums) __attribute__((always_inline)) {
    const I factor = V::factor(factors + g * 16);
    if constexpr (R != 0)
      VAI_UNROLL for (int r = 0; r < R; ++r) total[r] = V::dot4_times(total[r], V::load_line(sums + r * 16), factor);
    else
      for (int r = 0; r < n; ++r) total[r] = V::dot4_times(total[r], V::load_line(sums + r * 16), factor);
  };
  auto codes_at = [&](int g) { return record + size_t(g * kSpan / 32) * size_t(n) * 32 + g * kSpan % 32; };
  each_span<R != 0>(codes_at, panel, kSpan * 16, kSpans, ahead, part);
  const float* const scales = (const float*)(record + n * 256);
  const int32_t* const sums = (const int32_t*)(record + n * 260);
  const F scale = V::load_f16(block);
  I pairs[kSpans / 2];
  F minimum{};
  if constexpr (kMinimum) {
    VAI_UNROLL for (int i = 0; i < kSpans / 2; ++i) pairs[i] = V::pairs(unpacked[1] + 2 * i * 16, unpacked[1] + 2 * i * 16 + 16);
    minimum = V::load_f16(block + 32);
  }
  auto row = [&](int r) __attribute__((always_inline)) {
    const F own = V::set1(scales[r]);
    F product = V::mul(V::to_float(total[r]), V::mul(scale, own));
    if constexpr (kMinimum) {
      I offset = V::iset1(0);
      VAI_UNROLL for (int i = 0; i < kSpans / 2; ++i) offset = V::dot_pairs(offset, pairs[i], sums[i * n + r]);
      product = V::sub(product, V::mul(V::to_float(offset), V::mul(minimum, own)));
    }
    V::store(out + r * kScratchWidth, V::add(V::load(out + r * kScratchWidth), product));
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

// ---- the layer

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
                      kChunkBytes / (kChunk / span_of(T))};
    unpack<T>(block, columns, panel);
    for (int m = m0; m < m1; m += kTileRows) {
      const int rows = m1 - m < kTileRows ? m1 - m : kTileRows;
      const uint8_t* record = a.packed + size_t(m) * row_bytes + size_t(k / kL.group) * size_t(rows) * size_t(record_bytes(kL.group));
      multiply<T>(block, record, panel, rows, columns, m == m0 ? ahead : Ahead{}, sums + (m - m0) * kScratchWidth);
    }
  }
}

void tiled_block(const LinearArgs& a, int m0, int m1, const uint8_t* block, uint8_t* panel, float* sums) {
  switch (a.weight.type) {
    case BlockType::kQ4_0: return tiled<BlockType::kQ4_0>(a, m0, m1, block, panel, sums);
    case BlockType::kQ8_0: return tiled<BlockType::kQ8_0>(a, m0, m1, block, panel, sums);
    case BlockType::kQ4_K: return tiled<BlockType::kQ4_K>(a, m0, m1, block, panel, sums);
    case BlockType::kQ5_K: return tiled<BlockType::kQ5_K>(a, m0, m1, block, panel, sums);
    case BlockType::kQ6_K: return tiled<BlockType::kQ6_K>(a, m0, m1, block, panel, sums);
    case BlockType::kQ4_1: return tiled<BlockType::kQ4_1>(a, m0, m1, block, panel, sums);
    case BlockType::kQ5_0: return tiled<BlockType::kQ5_0>(a, m0, m1, block, panel, sums);
    case BlockType::kQ5_1: return tiled<BlockType::kQ5_1>(a, m0, m1, block, panel, sums);
    case BlockType::kIQ4_NL: return tiled<BlockType::kIQ4_NL>(a, m0, m1, block, panel, sums);
    case BlockType::kIQ4_XS: return tiled<BlockType::kIQ4_XS>(a, m0, m1, block, panel, sums);
    case BlockType::kMXFP4: return tiled<BlockType::kMXFP4>(a, m0, m1, block, panel, sums);
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
  configure(few ? 0 : rest, span_of(a.weight.type));
  for (int m0 = 0; m0 < a.rows; m0 += kRowsPerPass) {
    const int m1 = a.rows - m0 < kRowsPerPass ? a.rows : m0 + kRowsPerPass;
    const int tiled = m1 == a.rows ? m1 - few : m1;
    for (int i = begin; i < end; ++i) {
      for (int j = 0; j < (a.gated ? 2 : 1); ++j) {
        const uint8_t* const block = a.weight.block(i) + size_t(j) * a.weight.row_bytes();
        if (tiled > m0) tiled_block(a, m0, tiled, block, panel, sums + j * 16);
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
