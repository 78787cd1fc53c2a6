// The executor's operations: what each one reads and writes, and the table of its implementations.
//
// Every function works on a part of the operation ([begin, end) of rows, output blocks or units), so that any number of
// workers gives the same bits. Pointers were checked when the plan was built or the step was accepted.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vai {

enum class BlockType : int {
  kQ4_0, kQ8_0, kF16, kBF16, kF32, kQ4_K, kQ5_K, kQ6_K, kQ4_1, kQ5_0, kQ5_1, kIQ4_NL, kIQ4_XS, kMXFP4,
  kQ2_K, kQ3_K, kIQ1_S, kIQ1_M, kIQ2_XXS, kIQ2_XS, kIQ2_S, kIQ3_XXS, kIQ3_S, kTQ1_0, kTQ2_0  // raw
};
constexpr int kBlockTypes = 25;

// Stored as the checkpoint's own blocks of 256 columns, one after the other for 16 rows, and made binary32 in the kernel.
constexpr bool is_raw(BlockType t) { return t >= BlockType::kQ2_K; }
enum class Act : int { kSilu, kGeluTanh };
constexpr int kActs = 2;
enum class KvType : int { kBf16, kF32, kQ8_0 };

constexpr int kPageTokens = 32;
constexpr int kAttentionChunk = 1024;
constexpr int kKvGroup = 32;  // elements of a head that share a scale in kQ8_0
constexpr int kAttentionQueries = 24;  // queries that share one reading of K and V

// Activations are quantized in groups of 32 columns, or of 256 for the K types.
constexpr int kGroup = 32, kWideGroup = 256;

// One block of 16 rows; every part is lines of 64 bytes, 4 for each row.
struct Layout {
  int columns, bytes;
  int group;        // columns that share one activation scale; 0: the activations are floats
  int bits;         // of a code; 0: raw
  int lines, high;  // where the lines of codes (of their low four bits) begin, and those of the bits above
};

constexpr Layout layout(BlockType t) {
  switch (t) {
    case BlockType::kQ4_0: return {64, 576, kGroup, 4, 64, 0};
    case BlockType::kQ4_1: return {64, 640, kGroup, 4, 128, 0};
    case BlockType::kQ5_0: return {64, 704, kGroup, 5, 64, 576};
    case BlockType::kQ5_1: return {64, 768, kGroup, 5, 128, 640};
    case BlockType::kQ8_0: return {64, 1088, kGroup, 8, 64, 0};
    case BlockType::kQ4_K: return {256, 2304, kWideGroup, 4, 256, 0};
    case BlockType::kQ5_K: return {256, 2816, kWideGroup, 5, 256, 2304};
    case BlockType::kQ6_K: return {256, 3392, kWideGroup, 6, 320, 2368};
    case BlockType::kIQ4_NL: return {64, 576, kGroup, 4, 64, 0};
    case BlockType::kMXFP4: return {64, 544, kGroup, 4, 32, 0};
    case BlockType::kIQ4_XS: return {256, 2176, kWideGroup, 4, 128, 0};
    case BlockType::kF16:
    case BlockType::kBF16: return {32, 1024, 0, 16, 0, 0};
    case BlockType::kF32: return {16, 1024, 0, 32, 0, 0};
    case BlockType::kQ2_K: return {256, 16 * 84, 0, 0, 0, 0};
    case BlockType::kQ3_K: return {256, 16 * 110, 0, 0, 0, 0};
    case BlockType::kIQ1_S: return {256, 16 * 50, 0, 0, 0, 0};
    case BlockType::kIQ1_M: return {256, 16 * 56, 0, 0, 0, 0};
    case BlockType::kIQ2_XXS: return {256, 16 * 66, 0, 0, 0, 0};
    case BlockType::kIQ2_XS: return {256, 16 * 74, 0, 0, 0, 0};
    case BlockType::kIQ2_S: return {256, 16 * 82, 0, 0, 0, 0};
    case BlockType::kIQ3_XXS: return {256, 16 * 98, 0, 0, 0, 0};
    case BlockType::kIQ3_S: return {256, 16 * 110, 0, 0, 0, 0};
    case BlockType::kTQ1_0: return {256, 16 * 54, 0, 0, 0, 0};
    case BlockType::kTQ2_0: return {256, 16 * 66, 0, 0, 0, 0};
  }
  return {};
}

// What a code of four bits stands for where it is no number itself: ggml's kvalues_iq4nl and kvalues_mxfp4, the latter
// being twice the values of OCP's E2M1 (their scales are half as large).
constexpr int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr int8_t kMxfp4Values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// One row's group, as NormArgs says. 32: codes, scale, sum. 256: codes, scale, sums of 32 and of 16 columns.
constexpr int record_bytes(int group) { return group == kWideGroup ? 256 + 4 + 8 * 2 + 16 * 2 : 32 + 4 + 4; }
// Where codes [32 * part, 32 * part + 32) of row `lane` stand in a record of R rows: [8][R][32], of more than kFewRows [4][R][64].
constexpr int kFewRows = 8;
constexpr int wide_codes(int R, int lane, int part) {
  return R > kFewRows ? (part / 2 * R + lane) * 64 + part % 2 * 32 : (part * R + lane) * 32;
}
constexpr size_t packed_row_bytes(int group, int columns) { return size_t(columns / group) * size_t(record_bytes(group)); }

// A matrix of 16-row blocks in the ROM; block i of the operation is stored block first + i * step.
struct Matrix {
  const uint8_t* data;
  BlockType type;
  int columns;
  int first, step;

  size_t row_bytes() const {  // of one row of blocks
    const Layout k = layout(type);
    return size_t((columns + k.columns - 1) / k.columns) * size_t(k.bytes);
  }
  const uint8_t* block(int i) const { return data + size_t(first + i * step) * row_bytes(); }
};

// The fast kind is there for weights that bfloat16 holds as well as their own type does: F16 and F32 would lose bits.
constexpr bool has_fast(BlockType t) { return t != BlockType::kF16 && t != BlockType::kF32; }

// One raw block -> its 256 weights; a tile of 16 -> [256 columns][16 rows]. Any bytes are a valid block.
void raw_block(BlockType, const uint8_t* block, float* out);
void raw_columns(BlockType, const uint8_t* tile, float* panel);

// Row `lane` of a row of blocks -> `columns` of its weights, dequantized as the checkpoint's format says.
void gather(const uint8_t* blocks, BlockType, int lane, int columns, float* out);

struct EmbedArgs {
  Matrix table;
  const int32_t* tokens;
  float* out;
  size_t ldo;
  float scale;
};
void embed(const EmbedArgs&, int begin, int end);

// Quantized rows, packed for linear: rows in blocks of `row_block`, R = the block's rows.
// packed32: per 32 columns R x 32 codes, R scales (binary32), R sums of the codes (int32).
// packed256: per 256 columns R x 256 codes as wide_codes says, R scales, 4 x R pairs of sums of 32 columns, 8 x R pairs of sums of 16
// columns (pairs of int16, neighbours in column order). With a null `weight` the rows are quantized as they are.
// Each of `heads` runs of `columns` is normalized on its own; one that is more than one is not quantized.
struct NormArgs {
  const float* x;
  size_t ldx;
  int rows, heads = 1, columns;
  const float* weight;
  float epsilon;
  const float* residual;  // added to what was normalized; may be null
  size_t ldr;
  float* out;  // may be null
  size_t ldo;
  uint8_t *packed32, *packed256;  // may be null
  int row_block;
  const int32_t* source = nullptr;  // if there is one, row m is row source[m] of x
};

// Bytes of a row of bfloat16: tiles of 32 columns, a line of 64 bytes each, and an odd number of lines, so that the rows of
// a tile do not meet in one set of a cache.
constexpr size_t narrow_bytes(int columns) { return size_t((columns + 31) / 32 | 1) * 64; }

// Rows -> bfloat16: nearest, half to even, but subnormal numbers become zeros of their sign; a NaN stays one. Behind the
// last column its tile is filled with zeros.
struct NarrowArgs {
  const float* x;
  size_t ldx;
  int columns;
  uint8_t* out;  // [rows][narrow_bytes(columns)]
};

struct LinearArgs {
  Matrix weight;
  int rows;
  size_t ahead;  // bytes from the weights that are read to those that are fetched, which suits the machine: no bit depends on it
  const uint8_t* packed;  // for the types that quantize, in groups as wide as theirs
  const float* x;         // for the float types
  size_t ldx;
  const uint8_t* narrow;  // for the fast kind: rows of narrow(); null in the exact one
  const float* bias;  // may be null; output block i has bias block bias_first + i * bias_step
  int bias_first, bias_step;
  const float* addend;  // may be null
  size_t lda;
  const float* residual;  // may be null
  size_t ldr;
  float* out;
  size_t ldo;
  // For gated layers of the fast kind; if not null, what comes out goes here as narrow() would make it, and not to `out`. Its
  // columns are whole tiles.
  uint8_t* narrow_out;
  size_t narrow_out_row;  // bytes
  // Gated: output block i is act(stored block first + i * step) * (the stored block after it). No addend, no residual.
  bool gated;
  Act act;
  float softcap;  // of what is not gated, last of all: softcap * tanh(y / softcap); 0: none
};

struct GluArgs {
  const float *gate, *up;
  size_t ldg, ldu;
  int columns;
  float* out;
  size_t ldo;
  Act act;
};

// cos and sin of position * frequency, each times `magnitude`, as [rows][pairs][2].
struct AnglesArgs {
  const int32_t* positions;
  const double* frequencies;
  int pairs;
  float* out;
  float magnitude = 1.0f;
};
void angles(const AnglesArgs&, int begin, int end);

struct RopeArgs {
  const float* x;
  size_t ldx;
  float* out;
  size_t ldo;
  int heads, head_dim, pairs;
  bool neox;
  const float* angles;
};
void rope(const RopeArgs&, int begin, int end);

constexpr int kv_scales(int head_dim) { return (head_dim + kKvGroup - 1) / kKvGroup; }
// Of the key, or the value, of one token and KV head.
constexpr size_t kv_bytes(KvType type, int head_dim) {
  switch (type) {
    case KvType::kBf16: return 2 * size_t(head_dim);
    case KvType::kF32: return 4 * size_t(head_dim);
    case KvType::kQ8_0: return size_t(head_dim) + 2 * size_t(kv_scales(head_dim));
  }
  return 0;
}

// The pages of one cache group as one step sees them; kernels/program.py says what stands in one.
struct Pages {
  uint8_t* pool;
  const int64_t* tables;  // [sequences][table_width] byte offsets
  size_t table_width;
  size_t layer_offset;
  int kv_heads, head_dim;
  KvType type;

  uint8_t* layer(int sequence, int position) const {
    return pool + tables[size_t(sequence) * table_width + size_t(position / kPageTokens)] + layer_offset;
  }
  // The keys of 16 tokens of a KV head, from a multiple of 16 on, and the values of the 32 of a page.
  uint8_t* keys(int sequence, int position, int kv_head) const {
    return layer(sequence, position) + size_t(kv_head * 2 + position % kPageTokens / 16) * 16 * kv_bytes(type, head_dim);
  }
  uint8_t* values(int sequence, int position, int kv_head) const {
    return layer(sequence, position) + size_t(kv_heads + kv_head) * kPageTokens * kv_bytes(type, head_dim);
  }
};

struct KvWriteArgs {
  Pages pages;
  const float *k, *v;
  size_t ldk, ldv;
  const int32_t *positions, *sequence_of_row;
};
void kv_write(const KvWriteArgs&, int begin, int end);

struct RowTile { int first, rows; };  // consecutive rows of one sequence

struct AttentionArgs {
  Pages pages;
  const float* q;
  size_t ldq;
  float* out;
  size_t ldo;
  int heads;
  float scale;
  const int32_t *positions, *sequence_of_row;
  const RowTile* tiles;  // unit u is tile u / kv_heads under KV head u % kv_heads
  size_t context;        // capacity of a score row, a multiple of 16
  int window;            // tokens a row sees, its own the last; 0: all
  float softcap;         // scores are softcap * tanh(score / softcap); 0: as they are
  int tile_rows = 0;     // most rows of a tile
};

constexpr int kMaxExperts = 1024;

// Which rows of a step go to which experts. The pairs of a row and one of its experts, sorted by expert and then by row, are
// the sorted rows: that of row m and its j-th expert (ids ascending) is position[m * used + j], the one at p is of row row[p],
// and expert e has [first[e], first[e + 1]). active: the experts that have any, ascending; how many at [experts].
struct Routing {
  int experts, used;
  int32_t* chosen;                     // [rows][used]
  float* shares;                       // [rows][used]
  int32_t *position, *row;             // [rows][used], [rows * used]
  int32_t *first, *active;             // [experts + 1] each
};
constexpr size_t routing_words(size_t rows, int experts, int used) { return 4 * rows * size_t(used) + 2 * (size_t(experts) + 1); }

struct RouteArgs {
  const float* logits;
  size_t ldl;
  bool renormalize;
  float scale;  // of the shares, last of all
  Routing routing;
};
void route(const RouteArgs&, int begin, int end);

// From what the rows chose to the sorted rows.
void sort_rows(const Routing&, int rows);
struct SortArgs { Routing routing; };

// Rows as `norm` says, in the order of the sorted rows, each expert's in blocks of their own; `norm.source` is null where they
// stand in that order already. For each expert rows, x, out and packed move on.
struct ExpertRowsArgs {
  NormArgs norm;
  Routing routing;
};

// An expert's matrix has `blocks` output blocks; all stand one below the other. Rows are sorted rows.
struct ExpertLinearArgs {
  LinearArgs linear;
  Routing routing;
  int blocks;
};

struct ExpertSumArgs {
  Routing routing;
  const float* x;  // sorted rows
  size_t ldx;
  int columns;
  const float* residual;  // may be null
  size_t ldr;
  float* out;
  size_t ldo;
};
void expert_sum(const ExpertSumArgs&, int begin, int end);

// x * s + residual with s = 1 / (1 + exp(-g)), g being the sum of gate * weight over `gate_columns` in the R16 order.
struct GatedAddArgs {
  const float* x;
  size_t ldx;
  int columns;
  const float* gate;
  size_t ldg;
  int gate_columns;
  const float* weight;
  const float* residual;
  size_t ldr;
  float* out;
  size_t ldo;
};
void gated_add(const GatedAddArgs&, int begin, int end);

struct SampleRow {
  float temperature;
  int32_t top_k;
  float top_p, min_p;
  uint64_t seed;
  uint32_t choice, position;
  int32_t logprobs;  // -1 none, else how many alternatives
};

struct SampleResult {
  int32_t token;  // -1: the row holds a NaN, or nothing finite
  float logprob;
  int32_t* top_ids;
  float* top_logprobs;
};

// p = exp(logits / temperature - highest / temperature), where no logit is a NaN; returns their sum in binary64, in the order R16.
struct ProbabilitiesArgs {
  const float* logits;
  int count;
  float temperature;
  float highest;  // of all logits
  float* p;
};

// One instruction set's implementations.
struct Isa {
  const char* name;
  int (*row_block)(int rows);
  void (*norm)(const NormArgs&, int begin, int end);
  void (*linear)(const LinearArgs&, int begin, int end);  // output blocks
  void (*glu)(const GluArgs&, int begin, int end);
  // `scratch`: attention_scratch(context, head_dim) floats of the worker's own.
  void (*attention)(const AttentionArgs&, int unit, float* scratch);
  double (*probabilities)(const ProbabilitiesArgs&);
};

// One implementation of the fast kind: bfloat16 times bfloat16, summed in binary32 (ops/fast/sums.h says in which order), the
// rest as in the exact kind.
struct Fast {
  const char* name;
  void (*narrow)(const NarrowArgs&, int begin, int end);  // rows
  // Any rows, any output blocks. `scratch`: fast_scratch(columns) bytes of the worker's own, on a line of 64.
  void (*linear)(const LinearArgs&, int begin, int end, uint8_t* scratch);
  // Of pages that are not kF32. `scratch`: fast_attention_scratch(context, head_dim) bytes, as above.
  void (*attention)(const AttentionArgs&, int unit, uint8_t* scratch);
};

constexpr int kFastQueries = 64;  // queries that share one reading of K and V

constexpr int kMaxFastRows = 512;   // rows that share one unpacking of the weights; what is more is done after them
constexpr int kFastColumns = 512;   // columns in one stretch: the activations of all rows for it stay in L2
constexpr int kFastBlocks = 16;     // stored blocks that take their turns at one stretch; shares of so many cost the least

// The weights of two blocks for one stretch, and the sums: of two blocks, or where there are more stretches of all.
constexpr size_t fast_scratch(int columns) {
  const bool one = columns <= kFastColumns;
  const size_t tiles = one ? size_t(columns + 31) / 32 : kFastColumns / 32;
  return tiles * 2 * 1024 + size_t(kMaxFastRows) * 16 * sizeof(float) * (one ? 2 : kFastBlocks);
}

// Between a query's scores and the next one's, and between weights: odd numbers of lines, so that the rows of a tile do not all
// stand in the same set of a cache.
constexpr size_t fast_score_stride(size_t context) { return (context + kPageTokens - 1) / kPageTokens * kPageTokens + 16; }
constexpr size_t kFastWeightStride = kAttentionChunk + 32;

constexpr size_t fast_attention_scratch(size_t context, int head_dim) {
  const size_t padded = size_t(head_dim + 31) / 32 * 32;
  return kFastQueries * (4 * fast_score_stride(context) + 8 * padded + 2 * padded + 2 * kFastWeightStride) + 2 * kAttentionChunk * padded;
}

constexpr size_t attention_scratch(size_t context, int head_dim) {
  const size_t padded = size_t(head_dim + 15) / 16 * 16;
  return kAttentionQueries * (context + 2 * padded) + kPageTokens * padded;
}

}  // namespace vai
