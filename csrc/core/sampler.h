// Sampling one row of logits: the normative algorithm, and the counter-based generator that draws.
#pragma once

#include <memory>
#include <vector>

#include "vai/ops.h"

namespace vai {

// What changes a row's logits before temperature, id by id: biases, then penalties on the tokens that were there before,
// then the mask.
struct Adjustments {
  const int32_t* bias_ids;
  const float* biases;
  int64_t bias_count;
  const int32_t* seen_ids;  // distinct
  const int32_t* made;      // how often each of them was made, 0 for one of the prompt's alone
  int64_t seen_count;
  float repetition, presence, frequency;
  const uint8_t* mask;  // a bit for each id, set for those that may be drawn; null: all of them
};

// Memory that rows share, one after the other.
struct SampleScratch {
  std::unique_ptr<float[]> p;  // a vector would clear what is written next
  size_t p_count = 0;
  std::vector<float> adjusted, peaks, floors, near, near_p;
  std::vector<int> near_ids;
  std::vector<uint64_t> kept, spare, near_mass;
  std::vector<double> masses;
};

// `adjustments` change what is drawn from, not the logprobs.
void sample_row(const Isa& isa, const float* logits, int count, const SampleRow& row, const Adjustments& adjustments,
                SampleScratch& scratch, SampleResult& result);

}  // namespace vai
