// The ceiling of the fast kind: four independent tiles of sums, as its linear layers have them.
#include "ops/fast/tiles.h"

#include "vai/ceilings.h"

namespace vai {

uint64_t multiply_bf16_amx(int rounds) {
  // Some processors are twice as fast while tiles are as tilezero leaves them, and layers' never are.
  alignas(64) uint8_t some[kTileBytes];
  for (uint8_t& byte : some) byte = 0x3c;
  configure(kTileRows, kTileRows);
  load<0>(some, 64), load<1>(some, 64), load<2>(some, 64), load<3>(some, 64);
  load<4>(some, 64), load<5>(some, 64), load<6>(some, 64), load<7>(some, 64);
  for (int i = 0; i < rounds; ++i) multiply<0, 4, 6>(), multiply<1, 4, 7>(), multiply<2, 5, 6>(), multiply<3, 5, 7>();
  release();
  return uint64_t(rounds) * 4 * 16 * 16 * 32;
}

}  // namespace vai
