// AMX's tiles as the fast kind uses them: 0 and 1 are sums of the first 16 rows, 2 and 3 of the next 16; 4 and 5 what those rows
// are multiplied from, 6 and 7 two times 16 columns to multiply with. Include from *amx.cc files only.
#pragma once

#include "ops/fast/tile_instructions.h"

namespace vai {
namespace {

constexpr int kTileColumns = 32, kTileRows = 16, kTileBytes = 1024;

inline void configure(int first_rows, int second_rows) {
  alignas(64) uint8_t config[64] = {1};  // the palette of eight tiles
  for (int tile = 0; tile < 8; ++tile) {
    config[16 + 2 * tile] = 64;
    const bool second = tile == 2 || tile == 3 || tile == 5;
    config[48 + tile] = uint8_t(tile >= 6 ? kTileRows : second ? second_rows : first_rows);
  }
  load_config(config);
}

}  // namespace
}  // namespace vai
