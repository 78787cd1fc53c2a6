// The fast kind with AMX: weights are made bfloat16 tiles in the worker's scratch, two blocks of 16 outputs at a time, and stay
// there while up to 512 rows pass by, 16 at a time. What is added in which order: portable.cc.
//
// A stretch of columns is done for some blocks before the next one begins, so that its activations stay in L2; the sums
// are stored in between, which changes no bit. The weights of a stretch (32 KB) stay in L1: activations are loaded so
// that they do not push them out.
#include "vai/vec_avx512.h"

#include "ops/fast/tiles.h"
#include "ops/linear/linear_impl.h"

namespace vai {
namespace {

using V = Avx512Vec;
using F = V::F;
using I = V::I;

constexpr size_t kSumBytes = kScratchWidth * sizeof(float);  // from one row of sums to the next

// Up to 16 rows of sums of one or two blocks go on over `tiles` tiles of columns. With four tiles, not eight: beside another
// thread a core has so few registers for tiles that there would be none left for what comes next.
template <int kBlocks>
void multiply_tiles(const uint8_t* activations, size_t row_bytes, const uint8_t* const* weights, int tiles, bool first, float* sums) {
  if (first) {
    zero<0>();
    if constexpr (kBlocks == 2) zero<1>();
  } else {
    load<0>(sums, kSumBytes);
    if constexpr (kBlocks == 2) load<1>(sums + 16, kSumBytes);
  }
  for (int t = 0; t < tiles; ++t) {
    load<3>(weights[0] + size_t(t) * kTileBytes, 64);
    load_passing<2>(activations + size_t(t) * 64, row_bytes);
    multiply<0, 2, 3>();
    if constexpr (kBlocks == 2) {
      load<3>(weights[1] + size_t(t) * kTileBytes, 64);
      multiply<1, 2, 3>();
    }
  }
  store<0>(sums, kSumBytes);
  if constexpr (kBlocks == 2) store<1>(sums + 16, kSumBytes);
}

// ---- weights as tiles: [columns / 2][16 rows][2]

constexpr bool is_signed(BlockType t) { return t == BlockType::kQ4_0 || t == BlockType::kQ5_0; }

// What codes of up to five bits stand for.
template <BlockType T>
inline __attribute__((always_inline)) void load_table(F (&table)[2]) {
  if constexpr (is_wide(T)) {
    table[0] = table[1] = V::load_i8(kIq4Values);
  } else if constexpr (T == BlockType::kMXFP4) {
    table[0] = table[1] = V::load_i8(kMxfp4Values);
  } else {
    const F count = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    table[0] = V::sub(count, V::set1(is_signed(T) ? float(1 << (layout(T).bits - 1)) : 0.0f));
    table[1] = V::add(table[0], V::set1(16.0f));
  }
}

// The weight, before it is scaled, that each lane has kShift bits up: looked up, or from six bits on a signed byte.
template <BlockType T, int kShift>
inline __attribute__((always_inline)) F weight_at(const F (&table)[2], I codes) {
  if constexpr (layout(T).bits == 4) return _mm512_permutexvar_ps(V::shifted<-kShift>(codes), table[0]);
  if constexpr (layout(T).bits == 5) return _mm512_permutex2var_ps(table[0], V::shifted<-kShift>(codes), table[1]);
  return V::to_float(_mm512_srai_epi32(V::shifted<24 - kShift % 32>(codes), 24));
}

// Four columns, whose codes are eight bits apart from bit kFirst on.
template <BlockType T, int kFirst, class Scaled>
inline __attribute__((always_inline)) void put_four(const F (&table)[2], I codes, const Scaled& scaled, uint8_t* out) {
  put_pair(scaled(weight_at<T, kFirst>(table, codes)), scaled(weight_at<T, kFirst + 8>(table, codes)), out);
  put_pair(scaled(weight_at<T, kFirst + 16>(table, codes)), scaled(weight_at<T, kFirst + 24>(table, codes)), out + 64);
}

// The 32 columns of group g of a block. Dequantized as gather() does it, each operation rounded.
template <BlockType T>
inline __attribute__((always_inline)) void unpack_tile(const uint8_t* block, const int8_t* factors, const int8_t* minimums, int g,
                                                       const F (&table)[2], uint8_t* out) {
  constexpr Layout kL = layout(T);
  constexpr int kLines = kL.bits == 8 ? 8 : 4, kSpans = T == BlockType::kQ6_K ? 2 : 1;  // spans: that have a scale each
  constexpr bool kRaised = kL.group == kWideGroup, kMinimum = T == BlockType::kQ4_1 || T == BlockType::kQ5_1;
  constexpr bool kLess = T == BlockType::kQ4_K || T == BlockType::kQ5_K;
  VAI_UNROLL for (int span = 0; span < kSpans; ++span) {
    F scale, offset = V::set1(0.0f);
    if constexpr (kRaised)
      scale = V::mul(V::load_f16(block), V::load_i8(factors + (g * kSpans + span) * 16));
    else if constexpr (T == BlockType::kMXFP4)
      scale = V::load_e8m0(block + g * 16);
    else
      scale = V::load_f16(block + g * 32);
    if constexpr (kMinimum) offset = V::load_f16(block + 64 + g * 32);
    if constexpr (kLess) offset = V::mul(V::load_f16(block + 32), V::load_i8(minimums + g * 16));
    auto scaled = [&](F weight) __attribute__((always_inline)) {
      const F product = V::mul(scale, weight);
      if constexpr (kMinimum) return V::add(product, offset);
      if constexpr (kLess) return V::sub(product, offset);
      return product;
    };
    I above = V::iset1(0);
    if constexpr (kL.high != 0) above = V::load_line(block + kL.high + (g * kSpans + span) * 64);
    VAI_UNROLL for (int i = 0; i < kLines / kSpans; ++i) {
      const int l = span * (kLines / kSpans) + i;
      const uint8_t* line = block + kL.lines + (g * kLines + l) * 64;
      uint8_t* const at = out + l * (kTileBytes / kLines);
      if constexpr (kL.bits == 4) {
        put_four<T, 0>(table, V::load_line(line), scaled, at);
        put_four<T, 4>(table, V::load_line(line), scaled, at + 128);
      } else if constexpr (kL.bits == 8) {
        put_four<T, 0>(table, _mm512_xor_si512(V::load_line(line), V::iset1(int(0x80808080u))), scaled, at);
      } else {
        V::Nibbles codes = codes_of<V, kL.bits>(line, above, i);
        if constexpr (kL.bits == 6)
          codes = {_mm512_sub_epi8(codes.low, _mm512_set1_epi8(32)), _mm512_sub_epi8(codes.high, _mm512_set1_epi8(32))};
        put_four<T, 0>(table, codes.low, scaled, at);
        put_four<T, 0>(table, codes.high, scaled, at + 128);
      }
    }
  }
}

template <BlockType T>
__attribute__((noinline)) void unpack(const uint8_t* block, int tiles, uint8_t* out) {
  constexpr Layout kL = layout(T);
  constexpr int kOfBlock = kL.columns / kTileColumns;
  F table[2] = {};
  if constexpr (kL.bits <= 5) load_table<T>(table);
  alignas(64) int8_t unpacked[2][128];
  const int8_t* factors = unpacked[0];
  for (; tiles > 0; tiles -= kOfBlock, block += kL.bytes) {
    if constexpr (T == BlockType::kQ4_K || T == BlockType::kQ5_K) six_bit_scales<V>(block, unpacked[0], unpacked[1]);
    if constexpr (T == BlockType::kIQ4_XS) signed_six_bits(block, unpacked[0]);
    if constexpr (T == BlockType::kQ6_K) factors = (const int8_t*)block + 64;
    VAI_ROLLED for (int g = 0; g < kOfBlock && g < tiles; ++g, out += kTileBytes)
      unpack_tile<T>(block, factors, unpacked[1], g, table, out);
  }
}

void unpack_raw(BlockType type, const uint8_t* block, int tiles, uint8_t* out) {
  const Layout l = layout(type);
  alignas(64) float panel[kPanelColumns * 16];
  for (; tiles > 0; tiles -= l.columns / kTileColumns, block += l.bytes) {
    raw_columns(type, block, panel);
    for (int k = 0; k < l.columns; k += 2, out += 64) put_pair(V::load(panel + k * 16), V::load(panel + k * 16 + 16), out);
  }
}

// The first `columns` of BF16 tiles, and zeros behind them.
void copy_tiles(const uint8_t* block, int columns, uint8_t* out) {
  for (int k = 0; k < (columns + kTileColumns - 1) / kTileColumns * kTileColumns; k += 2, block += 64, out += 64) {
    const uint32_t kept = k + 1 < columns ? 0xffffffffu : k < columns ? 0x0000ffffu : 0;
    V::store_line(out, V::iand(V::load_line(block), V::iset1(int(kept))));
  }
}

// Where the tiles of `columns` columns of a row of blocks are: unpacked into `out`, but those of BF16 are tiles already.
const uint8_t* tiles_of(BlockType type, const uint8_t* block, int columns, uint8_t* out) {
  const int tiles = (columns + kTileColumns - 1) / kTileColumns;
  switch (type) {
    case BlockType::kQ4_0: unpack<BlockType::kQ4_0>(block, tiles, out); break;
    case BlockType::kQ4_1: unpack<BlockType::kQ4_1>(block, tiles, out); break;
    case BlockType::kQ5_0: unpack<BlockType::kQ5_0>(block, tiles, out); break;
    case BlockType::kQ5_1: unpack<BlockType::kQ5_1>(block, tiles, out); break;
    case BlockType::kQ8_0: unpack<BlockType::kQ8_0>(block, tiles, out); break;
    case BlockType::kQ4_K: unpack<BlockType::kQ4_K>(block, tiles, out); break;
    case BlockType::kQ5_K: unpack<BlockType::kQ5_K>(block, tiles, out); break;
    case BlockType::kQ6_K: unpack<BlockType::kQ6_K>(block, tiles, out); break;
    case BlockType::kIQ4_NL: unpack<BlockType::kIQ4_NL>(block, tiles, out); break;
    case BlockType::kIQ4_XS: unpack<BlockType::kIQ4_XS>(block, tiles, out); break;
    case BlockType::kMXFP4: unpack<BlockType::kMXFP4>(block, tiles, out); break;
    case BlockType::kBF16:
      if (columns % kTileColumns == 0) return block;
      copy_tiles(block, columns, out);
      break;
    default: unpack_raw(type, block, tiles, out);
  }
  return out;
}

// ---- the layer

// What epilogue() does with a gated layer, rounded to bfloat16.
void narrow_epilogue(const LinearArgs& a, int first_row, int rows, int block, const float* sums) {
  uint8_t* out = a.narrow_out + size_t(first_row) * a.narrow_out_row + size_t(block) * 32;
  for (int r = 0; r < rows; ++r, sums += kScratchWidth, out += a.narrow_out_row)
    _mm256_storeu_si256((__m256i*)out, (__m256i)_mm512_cvtneps_pbh(gated_unit<V>(a, block, sums, 0)));
}

// The stored bytes of a stretch of one or two blocks.
struct Stretch {
  const uint8_t* block[2];
  int blocks;
  size_t bytes;  // of each

  // Fetches one of `parts` parts of it into L2. Inlined always, or gcc 12 takes it for one without effects.
  inline __attribute__((always_inline)) void fetch(int part, int parts) const {
    const size_t lines = (bytes + 63) / 64, from = lines * size_t(part) / size_t(parts), to = lines * size_t(part + 1) / size_t(parts);
    for (int j = 0; j < blocks; ++j)
      for (size_t line = from; line < to; ++line) _mm_prefetch((const char*)block[j] + line * 64, _MM_HINT_T1);
  }
};

struct Layer {
  const LinearArgs& a;
  const Layout l;
  const size_t row_bytes, narrow_row;
  int tile_rows = 0;  // as the tiles are configured

  explicit Layer(const LinearArgs& args)
      : a(args), l(layout(args.weight.type)), row_bytes(args.weight.row_bytes()), narrow_row(narrow_bytes(args.weight.columns)) {}

  int columns_from(int k) const { return a.weight.columns - k < kFastColumns ? a.weight.columns - k : kFastColumns; }

  // Output block i alone, or with the one after it if that is before `end`; gated: the two blocks of output block i.
  Stretch stretch(int i, int end, int k) const {
    const int blocks = a.gated || end - i > 1 ? 2 : 1, columns = columns_from(k);
    const uint8_t* block = a.weight.block(i) + size_t(k / l.columns) * size_t(l.bytes);
    return {{block, block + row_bytes * size_t(a.gated ? 1 : a.weight.step)}, blocks,
            size_t((columns + l.columns - 1) / l.columns) * size_t(l.bytes)};
  }

  // Rows [m, m + rows), at most 16, over one stretch of columns from k on.
  void multiply_rows(int m, int rows, int k, const uint8_t* const* weights, int blocks, float* sums) {
    if (rows != tile_rows) configure(tile_rows = rows);
    const uint8_t* activations = a.narrow + size_t(m) * narrow_row + size_t(k) * 2;
    const int tiles = (columns_from(k) + kTileColumns - 1) / kTileColumns;
    (blocks == 2 ? multiply_tiles<2> : multiply_tiles<1>)(activations, narrow_row, weights, tiles, k == 0, sums);
  }
};

}  // namespace

void linear_fast_amx(const LinearArgs& a, int begin, int end, uint8_t* scratch) {
  Layer layer(a);
  const int columns = a.weight.columns, outputs = a.gated ? 1 : 2;  // of two blocks
  const int turn = columns <= kFastColumns ? outputs : kFastBlocks / 2 * outputs;
  const size_t panel_bytes = size_t((layer.columns_from(0) + kTileColumns - 1) / kTileColumns) * kTileBytes;
  uint8_t* const panels[2] = {scratch, scratch + panel_bytes};
  float* const kept = reinterpret_cast<float*>(scratch + 2 * panel_bytes);
  for (int m0 = 0; m0 < a.rows; m0 += kMaxFastRows) {
    const int m1 = a.rows - m0 < kMaxFastRows ? a.rows : m0 + kMaxFastRows, steps = (m1 - m0 + kTileRows - 1) / kTileRows;
    for (int i0 = begin; i0 < end; i0 += turn) {
      const int i1 = end - i0 < turn ? end : i0 + turn;
      for (int k = 0; k < columns; k += kFastColumns) {
        float* sums = kept;
        for (int i = i0; i < i1; i += outputs, sums += kMaxFastRows * kScratchWidth) {
          const Stretch stored = layer.stretch(i, i1, k);
          const uint8_t* weights[2] = {};
          for (int j = 0; j < stored.blocks; ++j)
            weights[j] = tiles_of(a.weight.type, stored.block[j], layer.columns_from(k), panels[j]);
          // What is unpacked next: the same columns of other blocks, the next ones of these, or the next blocks.
          const bool last = k + kFastColumns >= columns, turns = i + outputs >= i1;
          const int next = turns ? (last ? i1 : i0) : i + outputs;
          const Stretch ahead = next < end ? layer.stretch(next, end, !turns ? k : last ? 0 : k + kFastColumns) : Stretch{};
          for (int step = 0; step < steps; ++step) {
            const int m = m0 + step * kTileRows, rows = m1 - m < kTileRows ? m1 - m : kTileRows;
            float* const own = sums + step * kTileRows * kScratchWidth;
            ahead.fetch(step, steps);
            layer.multiply_rows(m, rows, k, weights, stored.blocks, own);
            if (last && a.narrow_out)
              narrow_epilogue(a, m, rows, i, own);
            else if (last)
              epilogue<V>(a, m, rows, i, a.gated ? 1 : stored.blocks, own);
          }
        }
      }
    }
  }
  release();
}

}  // namespace vai
