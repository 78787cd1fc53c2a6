// The ceiling of the fast kind: four independent tiles of sums, as its linear layers have them.
#include <immintrin.h>

#include <cstring>

#include "vai/ceilings.h"

namespace vai {

uint64_t multiply_bf16_amx(int rounds) {
  alignas(64) uint8_t config[64] = {1};  // palette 1; then eight tiles of 16 rows of 64 bytes
  for (int tile = 0; tile < 8; ++tile) {
    const uint16_t bytes = 64;
    std::memcpy(config + 16 + 2 * tile, &bytes, 2);
    config[48 + tile] = 16;
  }
  asm volatile("ldtilecfg %0" ::"m"(config) : "memory");  // gcc 12's intrinsic tells of 8 of the 64 bytes
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int i = 0; i < rounds; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return uint64_t(rounds) * 4 * 16 * 16 * 32;
}

}  // namespace vai
