#include "core/plan.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include <sys/mman.h>

namespace vai {
namespace {

void require(bool holds, const char* what) {
  if (!holds) throw std::logic_error(std::string("a plan was lowered wrongly: ") + what);
}

void accept(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument("This step cannot run: " + what + ".");
}

// A worker takes its share of a linear operation in about this many pieces, so that who is done early can take some over.
constexpr int kPieces = 8;

int share_begin(int units, int worker, int count) { return int(int64_t(units) * worker / count); }


}  // namespace

Workspace::Workspace(size_t bytes) : bytes_(std::max<size_t>(bytes, 64)) {
  // Address space only: a page is taken when a step first writes it.
  void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<uint8_t*>(memory);
}

Workspace::~Workspace() { munmap(data_, bytes_); }

Plan::Plan(Workers& workers, const Isa& isa, const Fast* fast, const uint8_t* data, size_t data_bytes, Workspace& workspace,
           PlanShape shape)
    : workers_(workers), isa_(isa), fast_(fast), data_(data), data_bytes_(data_bytes), workspace_(workspace), shape_(std::move(shape)) {
  require(shape_.max_rows > 0 && shape_.max_outputs > 0, "no rows");
  require(!fast_ || shape_.max_rows <= kMaxFastRows, "more rows than the fast kind takes at once");
  sequence_of_row_.resize(size_t(shape_.max_rows));
}

uint8_t* Plan::area(size_t offset, size_t bytes) const {
  require(offset % 64 == 0 && offset <= workspace_.bytes() && bytes <= workspace_.bytes() - offset, "outside the workspace");
  return workspace_.data() + offset;
}

float* Plan::place(Place p, int columns, bool outputs, int copies) const {
  require(columns > 0 && size_t(columns) <= p.width, "a row wider than its place");
  const size_t floats = (size_t(capacity(outputs)) * size_t(copies) - 1) * p.width + size_t(columns);
  return reinterpret_cast<float*>(area(p.offset, floats * sizeof(float)));
}

uint8_t* Plan::packed(size_t offset, int group, int columns, bool outputs, int copies) const {
  require(columns % group == 0, "columns that are no whole groups");
  return area(offset, size_t(capacity(outputs)) * size_t(copies) * packed_row_bytes(group, columns));
}

uint8_t* Plan::narrowed(size_t offset, int columns, bool outputs) const {
  return area(offset, size_t(capacity(outputs)) * narrow_bytes(columns));
}

void Plan::take_scratch(size_t offset, size_t bytes) {
  instructions_.back().scratch = area(offset, size_t(workers_.count()) * bytes);
  instructions_.back().scratch_bytes = bytes;
}

Matrix Plan::matrix(const Weight& w) const {
  require(w.type >= 0 && w.type < kBlockTypes && w.rows > 0 && w.columns > 0 && w.first >= 0 && w.step > 0, "a bad weight");
  const Matrix m{data_ + w.offset, BlockType(w.type), w.columns, w.first, w.step};
  const int group = layout(m.type).group;
  require(group == 0 || w.columns % group == 0, "columns that are no whole groups");
  const size_t bytes = size_t((w.rows + 15) / 16) * m.row_bytes();
  require(w.offset <= data_bytes_ && bytes <= data_bytes_ - w.offset, "a weight outside the image");
  return m;
}

const float* Plan::vector(const Vector& v, int blocks) const {
  require(v.first >= 0 && v.step > 0 && size_t(v.first + (blocks - 1) * v.step) * 16 + 16 <= v.elements, "a vector too short");
  require(v.offset % sizeof(float) == 0 && v.offset <= data_bytes_ && v.elements <= (data_bytes_ - v.offset) / sizeof(float),
          "a vector outside the image");
  return reinterpret_cast<const float*>(data_ + v.offset);
}

size_t Plan::page_bytes(int group) const {
  const GroupShape& g = shape_.groups[size_t(group)];
  return size_t(g.layers) * 2 * kPageTokens * size_t(g.kv_heads) * kv_bytes(shape_.kv_type, g.head_dim);
}

Pages Plan::pages(int group, int layer) const {
  require(group >= 0 && size_t(group) < shape_.groups.size(), "no such cache group");
  const GroupShape& g = shape_.groups[size_t(group)];
  require(layer >= 0 && layer < g.layers, "no such layer");
  return {nullptr, nullptr, 0, page_bytes(group) / size_t(g.layers) * size_t(layer), g.kv_heads, g.head_dim, shape_.kv_type};
}

void Plan::add(Args args, Where where, int units) { instructions_.push_back({std::move(args), where, units}); }

void Plan::embed(const Weight& table, float scale, Place out, Where where) {
  require(!where.outputs && (table.rows + 15) / 16 > table.first + (shape_.vocabulary - 1) / 16 * table.step, "a table too short");
  add(EmbedArgs{matrix(table), nullptr, place(out, table.columns, false), out.width, scale}, where);
}

void Plan::norm(Place x, int heads, int columns, std::optional<Vector> weight, float epsilon, std::optional<Place> residual, std::optional<Place> out,
                std::optional<size_t> packed32, std::optional<size_t> packed256, Where where) {
  NormArgs a{};
  require(heads > 0 && (heads == 1 || (!packed32 && !packed256)), "heads of quantized rows");
  a.x = place(x, heads * columns, where.outputs);
  a.ldx = x.width;
  a.heads = heads;
  a.columns = columns;
  if (weight) a.weight = vector(*weight, (columns + 15) / 16);
  require(!weight || (weight->first == 0 && weight->step == 1), "a norm weight that is a part");
  a.epsilon = epsilon;
  require(!residual || heads == 1, "a residual of heads");
  if (residual) a.residual = place(*residual, columns, where.outputs), a.ldr = residual->width;
  if (out) a.out = place(*out, heads * columns, where.outputs), a.ldo = out->width;
  if (packed32) a.packed32 = packed(*packed32, kGroup, columns, where.outputs);
  if (packed256) a.packed256 = packed(*packed256, kWideGroup, columns, where.outputs);
  add(a, where);
}

void Plan::narrow(Place x, int columns, size_t out, Where where) {
  require(fast_, "narrow rows without a fast kind");
  add(NarrowArgs{place(x, columns, where.outputs), x.width, columns, narrowed(out, columns, where.outputs)}, where);
}

void Plan::linear(const Weight& weight, int blocks, std::optional<Place> x, std::optional<size_t> records,
                  std::optional<size_t> narrow, std::optional<size_t> scratch, std::optional<Vector> bias, std::optional<Place> addend, std::optional<Place> residual,
                  std::optional<Place> out, std::optional<size_t> narrow_out, bool gated, int act, float softcap, Where where) {
  LinearArgs a{};
  a.weight = matrix(weight);
  require(blocks > 0 && weight.first + (blocks - 1) * weight.step + (gated ? 1 : 0) < (weight.rows + 15) / 16, "too many blocks");
  const int group = layout(a.weight.type).group;
  require(narrow ? fast_ && has_fast(a.weight.type) && scratch && !records && !x : group ? records && !x : x && !records,
          "the wrong kind of activations");
  if (x) a.x = place(*x, weight.columns, where.outputs), a.ldx = x->width;
  if (records) a.packed = packed(*records, group, weight.columns, where.outputs);
  if (narrow) a.narrow = narrowed(*narrow, weight.columns, where.outputs);
  if (bias) {
    a.bias = vector({bias->offset, bias->elements, bias->first + (gated ? 1 : 0), bias->step}, blocks);
    a.bias_first = bias->first;
    a.bias_step = bias->step;
  }
  require(!gated || (!addend && !residual && softcap == 0.0f), "a gated unit with more to add");
  require(act >= 0 && act < kActs && softcap >= 0.0f, "no such activation");
  if (addend) a.addend = place(*addend, blocks * 16, where.outputs), a.lda = addend->width;
  if (residual) a.residual = place(*residual, blocks * 16, where.outputs), a.ldr = residual->width;
  require(narrow_out ? narrow && gated && !out && blocks % 2 == 0 : out.has_value(), "no place for what comes out");
  if (out) a.out = place(*out, blocks * 16, where.outputs), a.ldo = out->width;
  if (narrow_out) a.narrow_out = narrowed(*narrow_out, blocks * 16, where.outputs), a.narrow_out_row = narrow_bytes(blocks * 16);
  a.gated = gated;
  a.act = Act(act);
  a.softcap = softcap;
  add(a, where, blocks);
  instructions_.back().cursors = cursors_.emplace_back(size_t(workers_.count())).data();
  if (narrow) take_scratch(*scratch, fast_scratch(weight.columns));
}

void Plan::glu(Place gate, Place up, int act, int columns, Place out, Where where) {
  require(act >= 0 && act < kActs, "no such activation");
  auto at = [&](Place p) { return place(p, columns, where.outputs, where.copies); };
  add(GluArgs{at(gate), at(up), gate.width, up.width, columns, at(out), out.width, Act(act)}, where);
}

void Plan::angles(std::vector<double> frequencies, float magnitude, size_t out, Where where) {
  require(!where.outputs && !frequencies.empty(), "no frequencies");
  const int pairs = int(frequencies.size());
  const auto& kept = frequencies_.emplace_back(std::move(frequencies));
  float* table = reinterpret_cast<float*>(area(out, size_t(shape_.max_rows) * size_t(pairs) * 2 * sizeof(float)));
  add(AnglesArgs{nullptr, kept.data(), pairs, table, magnitude}, where);
}

void Plan::rope(Place x, Place out, int heads, int head_dim, int pairs, bool neox, size_t angles, Where where) {
  require(!where.outputs && heads > 0 && pairs > 0 && 2 * pairs <= head_dim, "a bad rotation");
  const float* table = reinterpret_cast<float*>(area(angles, size_t(shape_.max_rows) * size_t(pairs) * 2 * sizeof(float)));
  add(RopeArgs{place(x, heads * head_dim, false), x.width, place(out, heads * head_dim, false), out.width, heads, head_dim, pairs,
               neox, table},
      where);
}

void Plan::kv_write(Place k, Place v, int group, int layer, Where where) {
  const Pages p = pages(group, layer);
  require(!where.outputs, "keys of output rows");
  add(KvWriteArgs{p, place(k, p.kv_heads * p.head_dim, false), place(v, p.kv_heads * p.head_dim, false), k.width, v.width, nullptr,
                  sequence_of_row_.data()},
      where, group);
}

void Plan::attention(Place q, Place out, int group, int layer, int heads, float scale, int window, float softcap, size_t scratch,
                     Where where) {
  const Pages p = pages(group, layer);
  const int kept = shape_.groups[size_t(group)].window;
  require(window >= 0 && softcap >= 0.0f && (kept == 0 || (window > 0 && window <= kept)), "a window wider than its group's");
  require(!where.outputs && heads > 0 && heads % p.kv_heads == 0, "heads that do not share evenly");
  require(scale > 0.0f, "scores that are not multiplied by a positive number");
  const bool fast = fast_ && p.type != KvType::kF32;  // who keeps binary32 wants them multiplied
  const size_t context = size_t(shape_.context + 15) / 16 * 16;
  AttentionArgs a{p,       place(q, heads * p.head_dim, false), q.width, place(out, heads * p.head_dim, false), out.width, heads, scale,
                  nullptr, sequence_of_row_.data(),             nullptr, context, window, softcap,
                  std::max(1, (fast ? kFastQueries : kAttentionQueries) / (heads / p.kv_heads))};
  add(a, where, group);
  Instruction& instruction = instructions_.back();
  instruction.next = &counters_.emplace_back(0);
  tiles_[a.tile_rows];
  take_scratch(scratch, fast ? fast_attention_scratch(context, p.head_dim) : attention_scratch(context, p.head_dim) * sizeof(float));
}

Routing Plan::routing(Routed r) const {
  require(r.experts > 0 && r.experts <= kMaxExperts && r.used > 0 && r.used <= r.experts, "bad experts");
  const size_t rows = size_t(shape_.max_rows), pairs = rows * size_t(r.used);
  auto* words = reinterpret_cast<int32_t*>(area(r.offset, routing_words(rows, r.experts, r.used) * sizeof(int32_t)));
  int32_t* first = words + 4 * pairs;
  return {r.experts, r.used, words, reinterpret_cast<float*>(words + pairs), words + 2 * pairs, words + 3 * pairs,
          first,     first + r.experts + 1};
}

void Plan::route(Place logits, Routed routed, bool renormalize, float scale, Where where) {
  require(!where.outputs, "experts of output rows");
  add(RouteArgs{place(logits, routed.experts, false), logits.width, renormalize, scale, routing(routed)}, where);
}

void Plan::sort(Routed routed, Where where) { add(SortArgs{routing(routed)}, where); }

void Plan::expert_rows(Place x, int columns, Routed routed, bool gathered, std::optional<Place> out,
                       std::optional<size_t> packed32, std::optional<size_t> packed256, Where where) {
  const int used = routed.used;
  ExpertRowsArgs a{{}, routing(routed)};
  require(!where.outputs && where.copies == used, "rows that are not the experts'");
  a.norm.x = place(x, columns, false, gathered ? 1 : used);
  a.norm.ldx = x.width;
  a.norm.columns = columns;
  if (gathered) a.norm.source = a.routing.row;
  if (out) a.norm.out = place(*out, columns, false, used), a.norm.ldo = out->width;
  if (packed32) a.norm.packed32 = packed(*packed32, kGroup, columns, false, used);
  if (packed256) a.norm.packed256 = packed(*packed256, kWideGroup, columns, false, used);
  add(a, where);
}

void Plan::expert_linear(const Weight& weight, int blocks, std::optional<Place> x, std::optional<size_t> records, Place out,
                         bool gated, Routed routed, Where where) {
  ExpertLinearArgs a{{}, routing(routed), blocks};
  require(!where.outputs && where.copies == routed.used, "rows that are not the experts'");
  a.linear.weight = matrix(weight);
  require(blocks > 0 && weight.first + (routed.experts * blocks - 1) * weight.step + (gated ? 1 : 0) < (weight.rows + 15) / 16,
          "too many blocks");
  const int group = layout(a.linear.weight.type).group;
  require(group ? records && !x : x && !records, "the wrong kind of activations");
  if (x) a.linear.x = place(*x, weight.columns, false, routed.used), a.linear.ldx = x->width;
  if (records) a.linear.packed = packed(*records, group, weight.columns, false, routed.used);
  a.linear.out = place(out, blocks * 16, false, routed.used);
  a.linear.ldo = out.width;
  a.linear.gated = gated;
  add(a, where);
  instructions_.back().next = &counters_.emplace_back(0);
}

void Plan::expert_sum(Place x, int columns, Routed routed, std::optional<Place> residual, Place out, Where where) {
  require(!where.outputs, "experts of output rows");
  ExpertSumArgs a{routing(routed), place(x, columns, false, routed.used), x.width, columns, nullptr, 0, place(out, columns, false),
                  out.width};
  if (residual) a.residual = place(*residual, columns, false), a.ldr = residual->width;
  add(a, where);
}

void Plan::gated_add(Place x, int columns, Place gate, int gate_columns, const Vector& weight, Place residual, Place out,
                     Where where) {
  require(weight.first == 0 && weight.step == 1, "a gate's weight that is a part");
  auto at = [&](Place p, int n) { return place(p, n, where.outputs); };
  add(GatedAddArgs{at(x, columns), x.width, columns, at(gate, gate_columns), gate.width, gate_columns,
                   vector(weight, (gate_columns + 15) / 16), at(residual, columns), residual.width, at(out, columns), out.width},
      where);
}

void Plan::rows(Place x, int columns, Place out, Where where) {
  require(where.outputs, "output rows of output rows");
  add(CopyArgs{place(x, columns, false), x.width, columns, place(out, columns, true), out.width}, where);
}

void Plan::result(Place out, int columns, bool of_outputs) {
  result_ = place(out, columns, of_outputs);
  result_columns_ = size_t(columns);
  result_width_ = out.width;
  result_of_outputs_ = of_outputs;
}

void Plan::check(const Step& s) const {
  accept(s.rows > 0 && s.rows <= size_t(shape_.max_rows),
         std::to_string(s.rows) + " rows where 1 to " + std::to_string(shape_.max_rows) + " fit");
  accept(s.positions_count == s.rows, "tokens and positions differ in number");
  accept(s.sequences > 0 && s.starts == s.sequences + 1, "seq_start must have one entry more than context");
  accept(s.seq_start[0] == 0 && size_t(s.seq_start[s.sequences]) == s.rows, "seq_start must go from 0 to the number of rows");
  accept(s.outputs <= size_t(shape_.max_outputs),
         std::to_string(s.outputs) + " output rows where " + std::to_string(shape_.max_outputs) + " fit");
  for (size_t i = 0; i < s.outputs; ++i)
    accept(s.output_rows[i] >= 0 && size_t(s.output_rows[i]) < s.rows && (i == 0 || s.output_rows[i] > s.output_rows[i - 1]),
           "output_rows must be ascending indices of rows");
  for (size_t m = 0; m < s.rows; ++m)
    accept(s.tokens[m] >= 0 && s.tokens[m] < shape_.vocabulary,
           "token " + std::to_string(s.tokens[m]) + " is not in the vocabulary of " + std::to_string(shape_.vocabulary));
  accept(!s.seconds || s.seconds_count == instructions_.size(), "there must be one time for each instruction");
  accept(s.tables.size() == shape_.groups.size(), "one block table is needed for each cache group");
  for (const auto& table : s.tables) accept(table.sequences == s.sequences, "a block table needs one row for each sequence");
  for (size_t q = 0; q < s.sequences; ++q) {
    const int first = s.seq_start[q], last = s.seq_start[q + 1];
    accept(first < last && size_t(last) <= s.rows, "every sequence needs at least one row");
    accept(s.context[q] >= 0 && s.context[q] <= shape_.context - (last - first),
           "a sequence would pass the context of " + std::to_string(shape_.context) + " tokens");
    for (int m = first; m < last; ++m)
      accept(s.positions[m] == s.context[q] + (m - first), "positions must continue from the sequence's context");
    const size_t pages = size_t(s.positions[last - 1]) / kPageTokens + 1;
    for (size_t g = 0; g < s.tables.size(); ++g) {
      const Step::Table& table = s.tables[g];
      const size_t bytes = page_bytes(int(g));
      accept(pages <= table.width, "a block table is too short for its sequence");
      const int window = shape_.groups[g].window, seen = s.context[q] + 1;  // nothing behind the first row's window is read
      for (size_t i = window && seen > window ? size_t((seen - window) / kPageTokens) : 0; i < pages; ++i) {
        const int64_t offset = table.pages[q * table.width + i];
        accept(offset >= 0 && offset % 64 == 0 && bytes <= s.pool_bytes && size_t(offset) <= s.pool_bytes - bytes,
               "a block table names a page outside the pool");
      }
    }
  }
}

// What the instructions need to know of this step.
void Plan::bind(const Step& s) {
  for (auto& [rows, tiles] : tiles_) tiles.clear();
  for (size_t q = 0; q < s.sequences; ++q) {
    std::fill(sequence_of_row_.begin() + s.seq_start[q], sequence_of_row_.begin() + s.seq_start[q + 1], int32_t(q));
    for (auto& [rows, tiles] : tiles_)
      for (int m = s.seq_start[q]; m < s.seq_start[q + 1]; m += rows) tiles.push_back({m, std::min(rows, s.seq_start[q + 1] - m)});
  }
  for (auto& instruction : instructions_) {
    const int rows = int(instruction.where.outputs ? s.outputs : s.rows);
    auto set_pages = [&](Pages& p) {
      const Step::Table& table = s.tables[size_t(instruction.units)];
      p.pool = s.pool;
      p.tables = table.pages;
      p.table_width = table.width;
    };
    if (auto* embed = std::get_if<EmbedArgs>(&instruction.args)) {
      embed->tokens = s.tokens;
    } else if (auto* norm = std::get_if<NormArgs>(&instruction.args)) {
      norm->rows = rows;
      norm->row_block = isa_.row_block(rows);
    } else if (auto* linear = std::get_if<LinearArgs>(&instruction.args)) {
      linear->rows = rows;
      linear->ahead = workers_.ahead();
      for (int w = 0; w < workers_.count(); ++w)
        instruction.cursors[w].next.store(share_begin(instruction.units, w, workers_.count()), std::memory_order_relaxed);
    } else if (auto* angles = std::get_if<AnglesArgs>(&instruction.args)) {
      angles->positions = s.positions;
    } else if (auto* kv = std::get_if<KvWriteArgs>(&instruction.args)) {
      kv->positions = s.positions;
      set_pages(kv->pages);
    } else if (auto* attention = std::get_if<AttentionArgs>(&instruction.args)) {
      attention->positions = s.positions;
      set_pages(attention->pages);
      attention->tiles = tiles_.at(attention->tile_rows).data();
      instruction.next->store(0, std::memory_order_relaxed);
    } else if (auto* experts = std::get_if<ExpertLinearArgs>(&instruction.args)) {
      experts->linear.ahead = workers_.ahead();
      instruction.next->store(0, std::memory_order_relaxed);
    }
  }
}

void Plan::run(const Step& step) {
  bind(step);
  if (step.seconds) ends_.assign(instructions_.size() + 1, {});
  workers_.run([&](int worker) { work(worker, step); });
  if (step.seconds)
    for (size_t i = 0; i < instructions_.size(); ++i) {
      ends_[i + 1] = std::max(ends_[i], ends_[i + 1]);  // who was to look at the clock may have lost its core
      step.seconds[i] += std::chrono::duration<double>(ends_[i + 1] - ends_[i]).count();
    }
}

// The worker's own share, a range of bytes of the weights, then what others have left of theirs: on a machine that is not ours
// alone a worker may lose its core for milliseconds. Who computes a block does not change its bits.
void Plan::multiply(int worker, const Instruction& instruction, const LinearArgs& args) {
  const int count = workers_.count();
  const int least = args.narrow ? kFastBlocks / (args.gated ? 2 : 1) : 2;  // what is done at once: tiles have two blocks
  for (int i = 0; i < count; ++i) {
    const int owner = (worker + i) % count;
    const int end = share_begin(instruction.units, owner + 1, count);
    const int share = end - share_begin(instruction.units, owner, count);
    const int piece = std::max(least, ((share + kPieces - 1) / kPieces + least - 1) / least * least);
    std::atomic<int>& next = instruction.cursors[owner].next;
    for (int at; (at = next.fetch_add(piece, std::memory_order_relaxed)) < end;) {
      if (args.narrow)
        fast_->linear(args, at, std::min(at + piece, end), instruction.scratch + size_t(worker) * instruction.scratch_bytes);
      else
        isa_.linear(args, at, std::min(at + piece, end));
    }
  }
}

// The sorted rows [begin, end), which may be those of several experts.
void Plan::sorted_rows(const ExpertRowsArgs& args, int begin, int end) {
  const int32_t *first = args.routing.first, *active = args.routing.active;
  for (int i = 0; i < active[args.routing.experts]; ++i) {
    const int start = first[active[i]], stop = first[active[i] + 1];
    if (stop <= begin || start >= end) continue;
    NormArgs a = args.norm;
    a.rows = stop - start;
    a.row_block = isa_.row_block(a.rows);
    if (a.source)
      a.source += start;
    else
      a.x += size_t(start) * a.ldx;
    if (a.out) a.out += size_t(start) * a.ldo;
    if (a.packed32) a.packed32 += size_t(start) * packed_row_bytes(kGroup, a.columns);
    if (a.packed256) a.packed256 += size_t(start) * packed_row_bytes(kWideGroup, a.columns);
    isa_.norm(a, std::max(begin, start) - start, std::min(end, stop) - start);
  }
}

// A unit is a piece of one expert's blocks under all of that expert's rows.
void Plan::multiply_experts(const Instruction& instruction, const ExpertLinearArgs& args) {
  const Routing& r = args.routing;
  const int active = r.active[r.experts], parts = workers_.count() * kPieces;
  const int piece = std::max(2, ((active * args.blocks + parts - 1) / parts + 1) & ~1);
  const int pieces = (args.blocks + piece - 1) / piece;
  for (int unit; (unit = instruction.next->fetch_add(1, std::memory_order_relaxed)) < active * pieces;) {
    const int expert = r.active[unit / pieces], begin = unit % pieces * piece, start = r.first[expert];
    LinearArgs a = args.linear;
    a.rows = r.first[expert + 1] - start;
    a.weight.first += expert * args.blocks * a.weight.step;
    if (a.packed) a.packed += size_t(start) * packed_row_bytes(layout(a.weight.type).group, a.weight.columns);
    if (a.x) a.x += size_t(start) * a.ldx;
    a.out += size_t(start) * a.ldo;
    isa_.linear(a, begin, std::min(begin + piece, args.blocks));
  }
}

void Plan::work(int worker, const Step& s) {
  const int count = workers_.count();
  // The last worker has work wherever there are rows. Where a barrier ends an instruction, it is over when the last one
  // comes, not when this one has been woken.
  const bool clock = s.seconds && worker == count - 1;
  if (clock) ends_[0] = std::chrono::steady_clock::now();
  for (auto& instruction : instructions_) {
    const int rows = int(instruction.where.outputs ? s.outputs : s.rows) * instruction.where.copies;
    auto share = [&](int units, auto&& part) {
      const int begin = share_begin(units, worker, count), end = share_begin(units, worker + 1, count);
      if (begin < end) part(begin, end);
    };
    auto visit = [&](const auto& a) {
      using A = std::decay_t<decltype(a)>;
      if constexpr (std::is_same_v<A, LinearArgs>) {
        if (rows > 0) multiply(worker, instruction, a);
      } else if constexpr (std::is_same_v<A, AttentionArgs>) {
        const auto& tiles = tiles_.at(a.tile_rows);
        const int units = int(tiles.size()) * a.pages.kv_heads;
        uint8_t* scratch = instruction.scratch + size_t(worker) * instruction.scratch_bytes;
        for (int u; (u = instruction.next->fetch_add(1, std::memory_order_relaxed)) < units;) {
          if (fast_ && a.pages.type != KvType::kF32)
            fast_->attention(a, u, scratch);
          else
            isa_.attention(a, u, reinterpret_cast<float*>(scratch));
        }
      } else if constexpr (std::is_same_v<A, SortArgs>) {
        if (worker == 0) sort_rows(a.routing, rows);
      } else if constexpr (std::is_same_v<A, ExpertLinearArgs>) {
        multiply_experts(instruction, a);
      } else {
        share(rows, [&](int b, int e) {
          if constexpr (std::is_same_v<A, EmbedArgs>) vai::embed(a, b, e);
          if constexpr (std::is_same_v<A, NormArgs>) isa_.norm(a, b, e);
          if constexpr (std::is_same_v<A, NarrowArgs>) fast_->narrow(a, b, e);
          if constexpr (std::is_same_v<A, GluArgs>) isa_.glu(a, b, e);
          if constexpr (std::is_same_v<A, AnglesArgs>) vai::angles(a, b, e);
          if constexpr (std::is_same_v<A, RopeArgs>) vai::rope(a, b, e);
          if constexpr (std::is_same_v<A, KvWriteArgs>) vai::kv_write(a, b, e);
          if constexpr (std::is_same_v<A, RouteArgs>) vai::route(a, b, e);
          if constexpr (std::is_same_v<A, ExpertRowsArgs>) sorted_rows(a, b, e);
          if constexpr (std::is_same_v<A, ExpertSumArgs>) vai::expert_sum(a, b, e);
          if constexpr (std::is_same_v<A, GatedAddArgs>) vai::gated_add(a, b, e);
          if constexpr (std::is_same_v<A, CopyArgs>)
            for (int r = b; r < e; ++r)
              std::memcpy(a.out + size_t(r) * a.ldo, a.x + size_t(s.output_rows[r]) * a.ldx, size_t(a.columns) * sizeof(float));
        });
      }
    };
    std::visit(visit, instruction.args);
    const bool ends = instruction.where.barrier ? workers_.barrier() && s.seconds : clock;
    if (ends) ends_[size_t(&instruction - instructions_.data()) + 1] = std::chrono::steady_clock::now();
  }
}

}  // namespace vai
