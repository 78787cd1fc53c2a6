#include "core/fast.h"

#include <algorithm>
#include <cmath>

#include "core/selftest.h"
#include "core/tiles.h"
#include "vai/scalar_types.h"

namespace vai {

void narrow_portable(const NarrowArgs&, int, int);
void linear_fast_portable(const LinearArgs&, int, int, uint8_t*);
void attention_fast_portable(const AttentionArgs&, int, uint8_t*);
static const Fast kPortable{"portable", narrow_portable, linear_fast_portable, attention_fast_portable};
#if defined(__x86_64__)
void narrow_amx(const NarrowArgs&, int, int);
void linear_fast_amx(const LinearArgs&, int, int, uint8_t*);
void attention_fast_amx(const AttentionArgs&, int, uint8_t*);
static const Fast kAmx{"amx", narrow_amx, linear_fast_amx, attention_fast_amx};
#endif

const std::vector<const Fast*>& built_fasts() {
  static const std::vector<const Fast*> fasts{
      &kPortable,
#if defined(__x86_64__)
      &kAmx,
#endif
  };
  return fasts;
}

namespace {

// What the processor says it has, and the operating system supports.
bool promised(const Fast& fast) {
#if defined(__x86_64__)
  if (&fast == &kAmx) return kEmulated || tiles_promised(TileUnit::kBf16);
#endif
  return &fast == &kPortable;
}

// ---- the self-test

constexpr int kRows = 19, kColumns = kWideGroup, kBlocks = 3, kOutputs = 16 * kBlocks;
constexpr size_t kWeightBytes = kBlocks * size_t(kColumns / 32) * 1024;  // BF16, the largest
constexpr int kHeads = 4, kHeadDim = 48, kMixed = kHeads * kHeadDim, kTokens = 2 * kPageTokens;
constexpr size_t kPage = 2 * kPageTokens * 2 * kHeadDim, kAttentionBytes = fast_attention_scratch(kTokens, kHeadDim);

// Static: a forked child of a process with threads must not allocate.
struct Case {
  float x[kRows * kColumns], found[2][kRows * kOutputs];
  float mixed[2][kRows * kMixed];
  alignas(64) uint8_t rows[kRows * narrow_bytes(kColumns)], weights[kWeightBytes], pages[2 * kPage];
  alignas(64) uint8_t scratch[std::max(fast_scratch(kColumns), kAttentionBytes)];
};
Case test;

void fill() {
  uint32_t state = 1;
  auto next = [&] { return (state = state * 1664525u + 1013904223u) >> 8; };
  for (float& x : test.x) x = (float(next() & 0xffff) - 32768.0f) * 0.0001f;
  // Whatever these are read as, they are finite: a byte below 0x40 is the upper one of any float.
  for (auto& byte : test.weights) byte = uint8_t(next() & 0x3f);
  for (auto& byte : test.pages) byte = uint8_t(next() & 0x3f);
  narrow_portable({test.x, kColumns, kColumns, test.rows}, 0, kRows);
}

// Two orders of additions, each of which is off by up to 2^-24 of what it adds up, for every addition.
bool near(const LinearArgs& a) {
  float weights[kColumns];
  for (int n = 0; n < kOutputs; ++n) {
    gather(a.weight.block(n / 16), a.weight.type, n % 16, kColumns, weights);
    for (int m = 0; m < kRows; ++m) {
      double size = 0;
      for (int k = 0; k < kColumns; ++k) size += std::fabs(double(test.x[m * kColumns + k]) * double(weights[k]));
      const double apart = double(test.found[0][m * kOutputs + n]) - double(test.found[1][m * kOutputs + n]);
      if (!(std::fabs(apart) <= 4 * kColumns * 0x1p-24 * size)) return false;
    }
  }
  return true;
}

// A mixture is a mean of values of less than 2, whose weights may each be rounded to one or the other of two neighbours.
bool mixes(const Fast& fast, const Fast& portable) {
  static const int64_t table[2] = {0, kPage};
  static int32_t positions[kRows], sequences[kRows];
  static const RowTile tile{0, kRows / kHeads};
  for (int m = 0; m < kRows; ++m) positions[m] = kTokens - kRows + m;
  for (int form = 0; form < 2; ++form) {
    AttentionArgs a{};
    a.pages = {test.pages, table, 2, 0, 1, kHeadDim, form ? KvType::kQ8_0 : KvType::kBf16};
    a.q = test.x, a.ldq = kColumns, a.ldo = kMixed, a.heads = kHeads, a.scale = 0.2f;
    a.positions = positions, a.sequence_of_row = sequences, a.tiles = &tile, a.context = kTokens;
    if (form) a.window = 20, a.softcap = 3.0f;
    a.out = test.mixed[0], portable.attention(a, 0, test.scratch);
    a.out = test.mixed[1], fast.attention(a, 0, test.scratch);
    const float least = form ? 256.0f : 2.0f;  // codes of up to 127 times such a scale
    for (int i = 0; i < tile.rows * kMixed; ++i)
      if (!(std::fabs(test.mixed[0][i] - test.mixed[1][i]) <= least * 0x1p-7f)) return false;
  }
  return true;
}

bool right(const Fast& fast, const Fast& portable) {
#if defined(__x86_64__)
  if (&fast == &kAmx) tiles_granted();  // or not: then the first tile ends the child
#endif
  fill();
  for (int type = 0; type < kBlockTypes; ++type) {
    if (!has_fast(BlockType(type))) continue;
    LinearArgs a{};
    a.weight = {test.weights, BlockType(type), kColumns, 0, 1};
    a.rows = kRows, a.narrow = test.rows, a.ldo = kOutputs;
    a.out = test.found[0], portable.linear(a, 0, kBlocks, test.scratch);
    a.out = test.found[1], fast.linear(a, 0, kBlocks, test.scratch);
    if (!near(a)) return false;
  }
  return mixes(fast, portable);
}

struct Found {
  std::vector<const Fast*> available;
  std::vector<RefusedFast> refused;
};

const Found& find() {
  static const Found found = [] {
    Found made;
    for (const Fast* fast : built_fasts()) {
      if (!promised(*fast)) continue;
      const char* wrong = fast == &kPortable ? nullptr : self_test(*fast, kPortable);
      if (wrong)
        made.refused.push_back({fast, wrong});
      else
        made.available.push_back(fast);
    }
    return made;
  }();
  return found;
}

}  // namespace

const char* self_test(const Fast& fast, const Fast& portable) {
  return tried_in_a_child([&] { return right(fast, portable); }, "it computes other sums than the portable implementation");
}

const std::vector<const Fast*>& available_fasts() { return find().available; }
const std::vector<RefusedFast>& refused_fasts() { return find().refused; }

}  // namespace vai
