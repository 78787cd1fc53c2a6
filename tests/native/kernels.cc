// The kernels alone, as a program: for sanitizers, which a Python module is no place for, and for processors that tests cannot
// run on. Random operations over memory that ends at a guard page; a row must be the same alone and in company; a Plan on
// three threads must repeat itself. Each implementation that is here, AVX-512 and AMX emulated, must give the portable one's
// bits. Prints a hash of every result: the same on every processor.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#include "core/plan.h"

namespace vai {

// One implementation of the exact kind, and one of the fast kind that is run beside it.
#define VAI_KERNELS(isa, fast)                                                                                      \
  int row_block_##isa(int);                                                                                         \
  void norm_##isa(const NormArgs&, int, int);                                                                       \
  void linear_##isa(const LinearArgs&, int, int);                                                                   \
  void glu_##isa(const GluArgs&, int, int);                                                                         \
  void attention_##isa(const AttentionArgs&, int, float*);                                                          \
  double probabilities_##isa(const ProbabilitiesArgs&);                                                             \
  void narrow_##fast(const NarrowArgs&, int, int);                                                                  \
  void linear_fast_##fast(const LinearArgs&, int, int, uint8_t*);                                                   \
  void attention_fast_##fast(const AttentionArgs&, int, uint8_t*);                                                  \
  static const Isa k_##isa{#isa,      row_block_##isa, norm_##isa,         linear_##isa,                            \
                           glu_##isa, attention_##isa, probabilities_##isa};                                        \
  static const Fast k_##isa##_fast{#fast, narrow_##fast, linear_fast_##fast, attention_fast_##fast};

VAI_KERNELS(scalar, portable)
#ifdef VAI_EMULATED
VAI_KERNELS(avx2, portable)
VAI_KERNELS(avx512, amx)
int row_block_amx(int);
void linear_amx(const LinearArgs&, int, int);
static const Isa k_amx{"amx", row_block_amx, norm_avx512, linear_amx, glu_avx512, attention_avx512, probabilities_avx512};
#endif

}  // namespace vai

namespace {

using namespace vai;

constexpr uint64_t kState = 88172645463325252u, kDigest = 14695981039346656037u;
uint64_t state, digest;

uint64_t next() {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return state;
}
int between(int low, int high) { return low + int(next() % uint64_t(high - low + 1)); }
float real() { return (float(next() >> 40) - 8388608.0f) * 0x1p-21f; }

void note(const float* x, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    if (std::isnan(x[i])) bits = 0x7fc00000;
    digest = (digest ^ bits) * 1099511628211u;
  }
}

void demand(bool holds, const char* what) {
  if (holds) return;
  std::printf("FAILED: %s\n", what);
  std::exit(1);
}

// Memory of exactly so many bytes: the one behind cannot be read.
template <class T>
class Guarded {
 public:
  explicit Guarded(size_t count) : page_(size_t(sysconf(_SC_PAGESIZE))), room_((count * sizeof(T) + page_ - 1) / page_ * page_) {
    base_ = static_cast<uint8_t*>(mmap(nullptr, room_ + page_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    demand(base_ != MAP_FAILED && mprotect(base_ + room_, page_, PROT_NONE) == 0, "no memory");
    data_ = reinterpret_cast<T*>(base_ + room_) - count;
  }
  ~Guarded() { munmap(base_, room_ + page_); }
  T* data() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }

 private:
  size_t page_, room_;
  uint8_t* base_;
  T* data_;
};

bool same(const float* a, const float* b, size_t count) {
  for (size_t i = 0; i < count; ++i)
    if (std::memcmp(a + i, b + i, 4) != 0 && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
  return true;
}

void linear_layers(const Isa& isa, const Fast& fast) {
  for (int type = 0; type < kBlockTypes; ++type)
    for (int round = 0; round < 4; ++round) {
      const Layout l = layout(BlockType(type));
      const int rows = round == 0 ? between(129, 200) : between(1, 20), blocks = between(1, 3);
      const int columns = l.group ? l.group * between(1, 3) : is_raw(BlockType(type)) ? 256 * between(1, 2) : between(1, 100);
      const size_t bytes = size_t(blocks) * size_t((columns + l.columns - 1) / l.columns) * size_t(l.bytes);
      const size_t width = size_t(blocks) * 16, k = size_t(columns);
      Guarded<uint8_t> weights(bytes);
      for (size_t i = 0; i < bytes; ++i) weights[i] = uint8_t(next() & (round == 1 ? 0xff : 0x3f));
      Guarded<float> x(size_t(rows) * k), y(size_t(rows) * width), one(width);
      for (size_t i = 0; i < size_t(rows) * k; ++i) x[i] = real();
      if (rows > 2) x[k] = NAN, x[2 * k] = INFINITY;
      auto multiply = [&](int first, int count, float* out) {
        const size_t room = l.group ? size_t(count) * packed_row_bytes(l.group, columns) : 1;
        Guarded<uint8_t> packed((room + 3) / 4 * 4);
        NormArgs norm{};
        norm.x = x.data() + size_t(first) * k, norm.ldx = k, norm.rows = count, norm.columns = columns;
        norm.row_block = isa.row_block(count);
        (l.group == kWideGroup ? norm.packed256 : norm.packed32) = packed.data();
        if (l.group) isa.norm(norm, 0, count);
        LinearArgs a{};
        a.weight = {weights.data(), BlockType(type), columns, 0, 1};
        a.rows = count, a.packed = l.group ? packed.data() : nullptr, a.x = l.group ? nullptr : norm.x, a.ldx = k;
        a.out = out, a.ldo = width;
        const int cut = between(0, blocks);
        isa.linear(a, 0, cut);
        isa.linear(a, cut, blocks);
      };
      auto multiply_fast = [&](int first, int count, float* out) {
        Guarded<uint8_t> narrowed(size_t(count) * narrow_bytes(columns)), scratch(fast_scratch(columns));
        fast.narrow({x.data() + size_t(first) * k, k, columns, narrowed.data()}, 0, count);
        LinearArgs a{};
        a.weight = {weights.data(), BlockType(type), columns, 0, 1};
        a.rows = count, a.narrow = narrowed.data(), a.out = out, a.ldo = width;
        fast.linear(a, 0, blocks, scratch.data());
        // What a gated layer leaves as bfloat16 is what it leaves else, made bfloat16.
        const int gated = blocks / 2 * 16;
        const size_t row = narrow_bytes(gated), bytes_out = size_t(count) * row;
        Guarded<float> wide(size_t(count) * size_t(gated));
        Guarded<uint8_t> expected(bytes_out), found(bytes_out);
        a.gated = true, a.weight.step = 2, a.out = wide.data(), a.ldo = size_t(gated);
        fast.linear(a, 0, gated / 16, scratch.data());
        fast.narrow({wide.data(), size_t(gated), gated, expected.data()}, 0, count);
        a.out = nullptr, a.narrow_out = found.data(), a.narrow_out_row = row;
        fast.linear(a, 0, gated / 16, scratch.data());
        for (int m = 0; m < count; ++m)
          demand(std::memcmp(expected.data() + size_t(m) * row, found.data() + size_t(m) * row, size_t(gated) * 2) == 0,
                 "a gated layer's bfloat16 is other than its binary32");
      };
      auto compare = [&](auto&& multiplied) {
        multiplied(0, rows, y.data());
        for (int row : {0, rows / 2, rows - 1}) {
          multiplied(row, 1, one.data());
          demand(same(one.data(), y.data() + size_t(row) * width, width), "a row alone is another row");
        }
        note(y.data(), size_t(rows) * width);
      };
      compare(multiply);
      if (has_fast(BlockType(type)) && round > 1) compare(multiply_fast);
      Guarded<float> gathered(k);
      const int32_t token = between(0, blocks * 16 - 1);
      embed({{weights.data(), BlockType(type), columns, 0, 1}, &token, gathered.data(), k, 1.0f}, 0, 1);
      note(gathered.data(), k);
    }
}

void attention_over_pages(const Isa& isa, const Fast& fast) {
  for (KvType type : {KvType::kBf16, KvType::kF32, KvType::kQ8_0})
    for (int width : {8, 20, 32}) {
      constexpr int kHeads = 4, kKvHeads = 2, kTokens = 70, kPages = 3;
      const size_t page = 2 * kPageTokens * kKvHeads * kv_bytes(type, width), out_width = kHeads * size_t(width);
      Guarded<uint8_t> pool(kPages * page);
      const int64_t table[kPages] = {int64_t(2 * page), 0, int64_t(page)};
      Guarded<int32_t> positions(kTokens), sequences(kTokens);
      Guarded<float> keys(kTokens * out_width), turned(kTokens * out_width), angle(kTokens * size_t(width / 2) * 2), out(3 * out_width);
      Guarded<double> frequencies(size_t(width / 2));
      for (int i = 0; i < width / 2; ++i) frequencies[size_t(i)] = 1.0 / (i + 1);
      for (int i = 0; i < kTokens; ++i) positions[size_t(i)] = i, sequences[size_t(i)] = 0;
      for (size_t i = 0; i < kTokens * out_width; ++i) keys[i] = real();
      angles({positions.data(), frequencies.data(), width / 2, angle.data()}, 0, kTokens);
      rope({keys.data(), out_width, turned.data(), out_width, kHeads, width, width / 2, width == 8, angle.data()}, 0, kTokens);
      Pages pages{pool.data(), table, kPages, 0, kKvHeads, width, type};
      kv_write({pages, turned.data(), keys.data(), out_width, out_width, positions.data(), sequences.data()}, 0, kTokens);
      AttentionArgs a{};
      a.pages = pages, a.q = turned.data() + (kTokens - 3) * out_width, a.ldq = out_width, a.out = out.data(), a.ldo = out_width;
      a.heads = kHeads, a.scale = 0.3f, a.positions = positions.data() + kTokens - 3, a.sequence_of_row = sequences.data();
      const RowTile tiles[2] = {{0, 2}, {2, 1}};
      a.tiles = tiles, a.context = 80;
      Guarded<float> scratch(attention_scratch(a.context, width));
      for (int unit = 0; unit < 2 * kKvHeads; ++unit) isa.attention(a, unit, scratch.data());
      note(out.data(), 3 * out_width);
      if (type == KvType::kF32) continue;
      Guarded<uint8_t> room(fast_attention_scratch(a.context, width));
      for (int unit = 0; unit < 2 * kKvHeads; ++unit) fast.attention(a, unit, room.data());
      note(out.data(), 3 * out_width);
    }
}

void the_rest(const Isa& isa) {
  for (int columns : {1, 16, 33, 100}) {
    const size_t k = size_t(columns);
    Guarded<float> gate(k * 3), up(k * 3), out(k * 3), p(k);
    for (size_t i = 0; i < k * 3; ++i) gate[i] = 20 * real(), up[i] = real();
    isa.glu({gate.data(), up.data(), k, k, columns, out.data(), k, Act::kSilu}, 0, 3);
    note(out.data(), 3 * k);
    const float total = float(isa.probabilities({gate.data(), columns, 0.7f, *std::max_element(gate.data(), gate.data() + k), p.data()}));
    note(p.data(), k);
    note(&total, 1);
  }
}

void plan_on_threads(const Isa& isa) {
  constexpr int kColumns = 64, kOutputs = 96, kRows = 40;
  constexpr size_t kTable = 4 * 1024, kWeights = kOutputs / 16 * 576;  // F32 in blocks of 16 x 16, Q4_0 in blocks of 16 x 64
  Guarded<uint8_t> image(kTable + kWeights);
  for (size_t i = 0; i < kTable + kWeights; ++i) image[i] = uint8_t(next() & 0x3f);
  constexpr size_t kPacked = kRows * kColumns * 4, kOut = kPacked + kRows * 2 * 40 + 64 - kRows * 2 * 40 % 64;
  constexpr size_t kCopied = kOut + kRows * kOutputs * 4;
  Workers workers(3);
  Workspace workspace(kCopied + kRows * kOutputs * 4);
  Plan plan(workers, isa, nullptr, image.data(), kTable + kWeights, workspace, {kRows, kRows, 16, 4096, KvType::kF32, {}});
  plan.embed({0, int(BlockType::kF32), 16, kColumns, 0, 1}, 1.0f, {0, kColumns}, {false, false, 1});
  plan.norm({0, kColumns}, 1, kColumns, {}, 0, {}, {}, kPacked, {}, {false, true, 1});
  plan.linear({kTable, int(BlockType::kQ4_0), kOutputs, kColumns, 0, 1}, kOutputs / 16, {}, kPacked, {}, {}, {}, {}, {}, Place{kOut, kOutputs},
              {}, false, 0, 0.0f, {false, true, 1});
  plan.rows({kOut, kOutputs}, kOutputs, {kCopied, kOutputs}, {true, true, 1});
  plan.result({kCopied, kOutputs}, kOutputs, true);
  std::vector<int32_t> tokens(kRows), positions(kRows);
  for (int i = 0; i < kRows; ++i) tokens[size_t(i)] = i % 16, positions[size_t(i)] = i;
  const int32_t bounds[2] = {0, kRows}, context = 0;
  std::vector<float> first;
  for (int run = 0; run < 50; ++run) {
    const Step step{tokens.data(), positions.data(), bounds, &context, positions.data(), kRows, kRows, 2, 1, kRows, {}, nullptr, 0, nullptr, 0};
    plan.check(step);
    plan.run(step);
    std::vector<float> got(plan.result_data(), plan.result_data() + kRows * kOutputs);
    if (run == 0) first = got;
    demand(same(first.data(), got.data(), got.size()), "a step that does not repeat itself");
  }
  note(first.data(), first.size());
}

uint64_t digest_of(const Isa& isa, const Fast& fast) {
  state = kState, digest = kDigest;
  linear_layers(isa, fast);
  attention_over_pages(isa, fast);
  the_rest(isa);
  plan_on_threads(isa);
  std::fprintf(stderr, "%s and %s: %016llx\n", isa.name, fast.name, (unsigned long long)digest);
  return digest;
}

}  // namespace

int main() {
  const uint64_t portable = digest_of(k_scalar, k_scalar_fast);
#ifdef VAI_EMULATED
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"))
    demand(digest_of(k_avx2, k_avx2_fast) == portable, "other bits than the portable ones");
  demand(digest_of(k_avx512, k_avx512_fast) == portable, "other bits than the portable ones");
  demand(digest_of(k_amx, k_avx512_fast) == portable, "other bits than the portable ones");
#endif
  std::printf("%016llx\n", (unsigned long long)portable);
}
