#include "core/selftest.h"

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <initializer_list>

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/tiles.h"

namespace vai {
namespace {

// Rows for whole tiles and a rest, and of types with integer scales, which some fold into codes, as many as they do it for.
constexpr int kManyRows = 28, kMostRows = 76;
constexpr int kRows = 3, kColumns = 256, kBlocks = 2, kOutputs = 16 * kBlocks;
constexpr int kHeads = 4, kHeadDim = 32, kTokens = 40;
constexpr size_t kWeightBytes = kBlocks * 16384;  // F32: 256 columns of 16 rows
constexpr size_t kPage = 2 * kPageTokens * kHeadDim * sizeof(float);

// What one implementation makes of the inputs. Static: a forked child of a process with threads must not allocate.
struct Outputs {
  uint8_t narrow[4096], wide[4096];
  float normal[kRows * kColumns], gated[kRows * kColumns], products[kBlockTypes][kRows * kOutputs];
  float many[kBlockTypes][kMostRows * kOutputs];
  float mixed[3][kRows * kHeads * kHeadDim], probabilities[kColumns];
  double total;
};
Outputs found[2];
// Records of many rows, which each implementation packs in its own way.
uint8_t many_narrow[kManyRows * packed_row_bytes(kGroup, kColumns)], many_wide[kMostRows * packed_row_bytes(kWideGroup, kColumns)];
struct Inputs {
  float x[kMostRows * kColumns], y[kMostRows * kColumns];
  alignas(64) uint8_t weights[kWeightBytes], pages[2 * kPage];
  float scratch[attention_scratch(64, kHeadDim)];
} in;

void fill() {
  uint32_t state = 1;
  auto next = [&] { return (state = state * 1664525u + 1013904223u) >> 8; };
  for (float* each : {in.x, in.y})
    for (int i = 0; i < kMostRows * kColumns; ++i) each[i] = (float(next() & 0xffff) - 32768.0f) * 0.0001f;
  // Whatever these are read as, they are finite: a byte below 0x40 is the upper one of any float.
  for (auto& byte : in.weights) byte = uint8_t(next() & 0x3f);
  for (auto& byte : in.pages) byte = uint8_t(next() & 0x3f);
}

void run(const Isa& isa, Outputs& out) {
  NormArgs norm{};
  norm.x = in.x, norm.ldx = kColumns, norm.rows = kRows, norm.columns = kColumns, norm.weight = in.y, norm.epsilon = 1e-6f;
  norm.out = out.normal, norm.ldo = kColumns, norm.packed32 = out.narrow, norm.packed256 = out.wide, norm.row_block = kRows;
  isa.norm(norm, 0, kRows);
  auto pack = [&](int rows, uint8_t* narrow, uint8_t* wide) {
    NormArgs many = norm;
    many.rows = rows, many.out = nullptr, many.packed32 = narrow, many.packed256 = wide, many.row_block = isa.row_block(rows);
    isa.norm(many, 0, rows);
  };
  pack(kManyRows, many_narrow, nullptr);
  pack(kMostRows, nullptr, many_wide);
  for (int type = 0; type < kBlockTypes; ++type) {
    const int group = layout(BlockType(type)).group;
    LinearArgs linear{};
    linear.weight = {in.weights, BlockType(type), kColumns, 0, 1};
    linear.rows = kRows, linear.packed = group == kWideGroup ? out.wide : out.narrow, linear.x = in.x, linear.ldx = kColumns;
    if (!group) linear.packed = nullptr;
    linear.out = out.products[type], linear.ldo = kOutputs;
    // As many rows to a record as this implementation reads at once.
    if (isa.row_block(kRows) == kRows) isa.linear(linear, 0, kBlocks);
    linear.rows = group == kWideGroup ? kMostRows : kManyRows, linear.out = out.many[type];
    if (group) linear.packed = group == kWideGroup ? many_wide : many_narrow;
    isa.linear(linear, 0, kBlocks);
  }
  GluArgs glu{};
  glu.gate = in.x, glu.up = in.y, glu.ldg = glu.ldu = glu.ldo = kColumns, glu.columns = kColumns, glu.out = out.gated;
  isa.glu(glu, 0, kRows);
  static const int64_t table[2] = {0, kPage};
  static const int32_t positions[kRows] = {kTokens - 2, kTokens - 1, kTokens}, sequences[kRows] = {};
  static const RowTile tile{0, kRows};
  for (KvType type : {KvType::kBf16, KvType::kF32, KvType::kQ8_0}) {
    AttentionArgs attention{};
    attention.pages = {in.pages, table, 2, 0, 1, kHeadDim, type};
    attention.q = in.x, attention.ldq = kColumns, attention.out = out.mixed[int(type)], attention.ldo = kHeads * kHeadDim;
    attention.heads = kHeads, attention.scale = 0.2f, attention.positions = positions, attention.sequence_of_row = sequences;
    attention.tiles = &tile, attention.context = 64;
    if (type == KvType::kF32) attention.window = 20, attention.softcap = 3.0f;
    isa.attention(attention, 0, in.scratch);
  }
  out.total = isa.probabilities({in.x, kColumns, 0.7f, *std::max_element(in.x, in.x + kColumns), out.probabilities});
}

bool equal(const Isa& isa, const Isa& portable) {
  tiles_granted();  // or not: then the first tile ends the child
  fill();
  run(portable, found[0]);
  run(isa, found[1]);
  return std::memcmp(&found[0], &found[1], sizeof(Outputs)) == 0;
}

// In the child: the answer it will give.
char answer_of(const std::function<bool()>& verdict) {
  for (int signal : {SIGILL, SIGSEGV, SIGBUS, SIGFPE, SIGTRAP}) std::signal(signal, SIG_DFL);
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  const rlimit no_core{0, 0};
  setrlimit(RLIMIT_CORE, &no_core);
  return verdict() ? 'y' : 'n';
}

}  // namespace

const char* tried_in_a_child(const std::function<bool()>& verdict, const char* wrong) {
  int ends[2];
  if (pipe(ends) != 0) return "it cannot be tried: the process has no descriptors left";
  const pid_t child = fork();
  if (child == 0) {
    const char answer = answer_of(verdict);
    _exit(write(ends[1], &answer, 1) == 1 ? 0 : 1);
  }
  close(ends[1]);
  char answer = 0;  // stays so where the child ends before it can say anything
  ssize_t count = -1;
  if (child > 0)
    do count = read(ends[0], &answer, 1);
    while (count < 0 && errno == EINTR);
  close(ends[0]);
  if (child < 0) return "it cannot be tried: the machine gives no process";
  while (waitpid(child, nullptr, 0) < 0 && errno == EINTR) {
  }
  if (answer == 'y') return nullptr;
  return answer == 'n' ? wrong : "its instructions end the process";
}

const char* self_test(const Isa& isa, const Isa& portable) {
  return tried_in_a_child([&] { return equal(isa, portable); }, "it computes other bits than the portable implementation");
}

}  // namespace vai
