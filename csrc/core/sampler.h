// Sampling one row of logits: the normative algorithm, and the counter-based generator that draws.
#pragma once

#include <vector>

#include "vai/ops.h"

namespace vai {

// Memory that rows share, one after the other.
struct SampleScratch {
  std::vector<float> p;
  std::vector<uint64_t> kept, spare;
};

void sample_row(const Isa& isa, const float* logits, int count, const SampleRow& row, SampleScratch& scratch,
                SampleResult& result);

}  // namespace vai
