// The ceiling of the fast kind: four independent tiles of sums, as its linear layers have them.
#include "ops/fast/tiles.h"

#include "vai/ceilings.h"

namespace vai {

uint64_t multiply_bf16_amx(int rounds) {
  configure(kTileRows, kTileRows);
  zero<0>(), zero<1>(), zero<2>(), zero<3>(), zero<4>(), zero<5>(), zero<6>(), zero<7>();
  for (int i = 0; i < rounds; ++i) multiply<0, 4, 6>(), multiply<1, 4, 7>(), multiply<2, 5, 6>(), multiply<3, 5, 7>();
  release();
  return uint64_t(rounds) * 4 * 16 * 16 * 32;
}

}  // namespace vai
