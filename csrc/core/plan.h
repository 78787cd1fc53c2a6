// A lowered Program: instructions over one workspace, run by the workers from the first to the last without returning.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <variant>
#include <vector>

#include "core/workers.h"
#include "vai/ops.h"

namespace vai {

// A matrix of floats in the workspace: byte offset of row 0, and floats from row to row.
struct Place {
  size_t offset, width;
};

// A matrix in the image: byte offset of its stored tensor, the tensor's stored rows and real columns, and which blocks of
// 16 rows are meant.
struct Weight {
  size_t offset;
  int type, rows, columns, first, step;
};

// A vector in the image: byte offset of its stored tensor, stored elements, and which blocks of 16 are meant.
struct Vector {
  size_t offset, elements;
  int first, step;
};

// Over which rows an instruction goes, and whether the next one reads what another worker wrote. `copies`: rows there are for
// each of them, one for each of its experts.
struct Where {
  bool outputs, barrier;
  int copies;
};

// The bytes of a Routing in the workspace.
struct Routed {
  size_t offset;
  int experts, used;
};

// `window`: tokens that a row sees at most, its own the last; 0: all.
struct GroupShape {
  int layers, kv_heads, head_dim, window;
};

struct PlanShape {
  int max_rows, max_outputs, vocabulary, context;
  KvType kv_type;
  std::vector<GroupShape> groups;
};

// One step as the caller hands it over; nothing of it is trusted before `check`.
struct Step {
  struct Table {
    const int64_t* pages;
    size_t sequences, width;
  };
  const int32_t *tokens, *positions, *seq_start, *context, *output_rows;
  size_t rows, positions_count, starts, sequences, outputs;
  std::vector<Table> tables;
  uint8_t* pool;
  size_t pool_bytes;
  double* seconds;  // may be null; one for each instruction, to which its time is added
  size_t seconds_count;
};

// The memory that values live in between two instructions. Plans of one model share it: none keeps anything in it.
class Workspace {
 public:
  explicit Workspace(size_t bytes);  // throws std::bad_alloc
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  const size_t bytes_;
  uint8_t* data_;
};

// Rows asked for, copied to the front.
struct CopyArgs {
  const float* x;
  size_t ldx;
  int columns;
  float* out;
  size_t ldo;
};

class Plan {
 public:
  // `fast`: whose linear layers and attention it has where the types of weights and pages allow it; null: exact ones alone.
  Plan(Workers& workers, const Isa& isa, const Fast* fast, const uint8_t* data, size_t data_bytes, Workspace& workspace,
       PlanShape shape);
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // Building, in order. What an instruction will touch is checked against image and workspace once, here; one that does not
  // fit is a mistake of the lowering: std::logic_error. `columns` count the values of a row that are read or written.
  void embed(const Weight& table, float scale, Place out, Where where);
  // `columns` of each of `heads`, which stand one after the other and share the weight.
  void norm(Place x, int heads, int columns, std::optional<Vector> weight, float epsilon, std::optional<Place> residual, std::optional<Place> out,
            std::optional<size_t> packed32, std::optional<size_t> packed256, Where where);
  // Rows as bfloat16, for the fast kind.
  void narrow(Place x, int columns, size_t out, Where where);
  // Exactly one of `x` and `records`, as the weight's type wants, or `narrow` for the fast kind, and then `scratch`: byte offset
  // of the workers' scratch, one after the other. `blocks`: output blocks of 16 columns. Exactly one of `out` and `narrow_out`,
  // where a gated layer of the fast kind leaves whole tiles of bfloat16.
  void linear(const Weight& weight, int blocks, std::optional<Place> x, std::optional<size_t> records, std::optional<size_t> narrow,
              std::optional<size_t> scratch, std::optional<Vector> bias, std::optional<Place> addend, std::optional<Place> residual,
              std::optional<Place> out, std::optional<size_t> narrow_out, bool gated, int act, float softcap, Where where);
  void glu(Place gate, Place up, int act, int columns, Place out, Where where);
  void angles(std::vector<double> frequencies, float magnitude, size_t out, Where where);
  void rope(Place x, Place out, int heads, int head_dim, int pairs, bool neox, size_t angles, Where where);
  void kv_write(Place k, Place v, int group, int layer, Where where);
  // `scratch`: byte offset of the workers' scratch, one after the other.
  void attention(Place q, Place out, int group, int layer, int heads, float scale, int window, float softcap, size_t scratch,
                 Where where);
  void route(Place logits, Routed routed, bool renormalize, float scale, Where where);
  void sort(Routed routed, Where where);
  // As norm without a weight. `gathered`: x has the rows of the step, not the sorted ones.
  void expert_rows(Place x, int columns, Routed routed, bool gathered, std::optional<Place> out, std::optional<size_t> packed32,
                   std::optional<size_t> packed256, Where where);
  // As linear; `blocks`: output blocks of each expert.
  void expert_linear(const Weight& weight, int blocks, std::optional<Place> x, std::optional<size_t> records, Place out, bool gated,
                     Routed routed, Where where);
  void expert_sum(Place x, int columns, Routed routed, std::optional<Place> residual, Place out, Where where);
  void gated_add(Place x, int columns, Place gate, int gate_columns, const Vector& weight, Place residual, Place out, Where where);
  void rows(Place x, int columns, Place out, Where where);
  void result(Place out, int columns, bool of_outputs);

  // Throws std::invalid_argument with one sentence if the step fits not the plan, the pool or itself.
  void check(const Step& step) const;
  // Runs a checked step. The results stay where `result_*` say until the next run.
  void run(const Step& step);

  float* result_data() const { return result_; }
  size_t result_rows(const Step& step) const { return result_of_outputs_ ? step.outputs : step.rows; }
  size_t result_columns() const { return result_columns_; }
  size_t result_width() const { return result_width_; }

 private:
  using Args = std::variant<EmbedArgs, NormArgs, NarrowArgs, LinearArgs, GluArgs, AnglesArgs, RopeArgs, KvWriteArgs, AttentionArgs, CopyArgs,
                            RouteArgs, SortArgs, ExpertRowsArgs, ExpertLinearArgs, ExpertSumArgs, GatedAddArgs>;
  struct alignas(64) Cursor {
    std::atomic<int> next{0};
  };
  struct Instruction {
    Args args;
    Where where;
    int units;  // linear: output blocks; KV operations: their cache group
    std::atomic<int>* next = nullptr;  // attention, experts: the unit that nobody has taken yet
    Cursor* cursors = nullptr;  // linear: for each worker, the block of its share that nobody has taken yet
    uint8_t* scratch = nullptr;  // of the first worker
    size_t scratch_bytes = 0;  // of each
  };

  int capacity(bool outputs) const { return outputs ? shape_.max_outputs : shape_.max_rows; }
  float* place(Place p, int columns, bool outputs, int copies = 1) const;
  uint8_t* area(size_t offset, size_t bytes) const;
  uint8_t* packed(size_t offset, int group, int columns, bool outputs, int copies = 1) const;
  uint8_t* narrowed(size_t offset, int columns, bool outputs) const;
  void take_scratch(size_t offset, size_t bytes);
  Routing routing(Routed routed) const;
  Matrix matrix(const Weight& weight) const;
  const float* vector(const Vector& v, int blocks) const;
  Pages pages(int group, int layer) const;
  size_t page_bytes(int group) const;
  void add(Args args, Where where, int units = 0);
  void bind(const Step& step);
  void work(int worker, const Step& step);
  void multiply(int worker, const Instruction& instruction, const LinearArgs& args);
  void sorted_rows(const ExpertRowsArgs& args, int begin, int end);
  void multiply_experts(const Instruction& instruction, const ExpertLinearArgs& args);

  Workers& workers_;
  const Isa& isa_;
  const Fast* const fast_;
  const uint8_t* data_;
  const size_t data_bytes_;
  const Workspace& workspace_;
  const PlanShape shape_;
  std::vector<Instruction> instructions_;
  std::deque<std::vector<double>> frequencies_;
  std::deque<std::atomic<int>> counters_;
  std::deque<std::vector<Cursor>> cursors_;
  std::vector<int32_t> sequence_of_row_;
  std::vector<std::chrono::steady_clock::time_point> ends_;  // of a timed step: its beginning, then each instruction's end
  std::map<int, std::vector<RowTile>> tiles_;  // by rows in a tile
  float* result_ = nullptr;
  size_t result_columns_ = 0, result_width_ = 0;
  bool result_of_outputs_ = false;
};

}  // namespace vai
