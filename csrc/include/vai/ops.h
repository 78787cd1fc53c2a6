// The executor's operations: what each one reads and writes, and the table of its implementations.
//
// Every function works on a part of the operation ([begin, end) of rows, output blocks or units), so that any number of
// workers gives the same bits. Pointers were checked when the plan was built or the step was accepted.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vai {

enum class BlockType : int { kQ4_0, kQ8_0, kF16, kBF16, kF32 };
enum class KvType : int { kBf16, kF32 };

constexpr int kPageTokens = 32;
constexpr int kAttentionChunk = 1024;
constexpr int kGroup = 32;        // columns that share one activation scale
constexpr int kRecordBytes = 40;  // one row's group: 32 codes, the scale (binary32), the sum of the codes (int32)
constexpr int kAttentionQueries = 4;  // queries that share one reading of K and V

constexpr int block_columns(BlockType t) {
  return t == BlockType::kF32 ? 16 : t == BlockType::kF16 || t == BlockType::kBF16 ? 32 : 64;
}
constexpr int block_bytes(BlockType t) {
  return t == BlockType::kQ4_0 ? 576 : t == BlockType::kQ8_0 ? 1088 : 1024;
}
constexpr bool quantizes(BlockType t) { return t == BlockType::kQ4_0 || t == BlockType::kQ8_0; }

// A matrix of 16-row blocks in the ROM; block i of the operation is stored block first + i * step.
struct Matrix {
  const uint8_t* data;
  BlockType type;
  int columns;
  int first, step;

  size_t row_bytes() const {  // of one row of blocks
    return size_t((columns + block_columns(type) - 1) / block_columns(type)) * size_t(block_bytes(type));
  }
  const uint8_t* block(int i) const { return data + size_t(first + i * step) * row_bytes(); }
};

struct EmbedArgs {
  Matrix table;
  const int32_t* tokens;
  float* out;
  size_t ldo;
};
void embed(const EmbedArgs&, int begin, int end);

// Quantized rows, packed for linear: rows in groups of `row_block`, R = the group's rows; per 32 columns R x 32 codes,
// R scales, R sums. With a null `weight` the rows are quantized as they are.
struct NormArgs {
  const float* x;
  size_t ldx;
  int rows, columns;
  const float* weight;
  float epsilon;
  float* out;  // may be null
  size_t ldo;
  uint8_t* packed;  // may be null
  int row_block;
};

struct LinearArgs {
  Matrix weight;
  int rows;
  const uint8_t* packed;  // for the types that quantize
  const float* x;         // for the float types
  size_t ldx;
  const float* bias;  // may be null; output block i has bias block bias_first + i * bias_step
  int bias_first, bias_step;
  const float* addend;  // may be null
  size_t lda;
  const float* residual;  // may be null
  size_t ldr;
  float* out;
  size_t ldo;
  // Gated: output block i is act(stored block first + i * step) * (the stored block after it). No addend, no residual.
  bool gated;
};

struct GluArgs {
  const float *gate, *up;
  size_t ldg, ldu;
  int columns;
  float* out;
  size_t ldo;
};

// cos and sin of position * frequency as [rows][pairs][2].
struct AnglesArgs {
  const int32_t* positions;
  const double* frequencies;
  int pairs;
  float* out;
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

// The pages of one cache group as one step sees them.
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
};

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

// z = logits / temperature, its maximum, and p = exp(z - maximum); false if a logit is a NaN.
struct ProbabilitiesArgs {
  const float* logits;
  int count;
  float temperature;
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
  bool (*probabilities)(const ProbabilitiesArgs&, float* maximum);
};

constexpr size_t attention_scratch(size_t context, int head_dim) {
  return kAttentionQueries * (context + 2 * size_t((head_dim + 15) / 16 * 16));
}

}  // namespace vai
