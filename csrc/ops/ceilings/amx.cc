// The ceiling of the fast kind: two tiles of sums, as its linear layers have them.
#include "ops/fast/tiles.h"

#include "vai/ceilings.h"

namespace vai {

uint64_t multiply_bf16_amx(int rounds) {
  // Tiles that tilezero has cleared take no register: beside another thread they are multiplied faster than any that hold something.
  alignas(64) uint8_t some[kTileBytes];
  for (uint8_t& byte : some) byte = 0x3c;
  configure(kTileRows);
  load<0>(some, 64), load<1>(some, 64), load<2>(some, 64), load<3>(some, 64);
  for (int i = 0; i < rounds; ++i) multiply<0, 2, 3>(), multiply<1, 2, 3>();
  release();
  return uint64_t(rounds) * 2 * 16 * 16 * 32;
}

}  // namespace vai
