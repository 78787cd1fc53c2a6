// AMX's tiles as the fast kind uses them: 0 and 1 are sums of the first 16 rows, 2 and 3 of the next 16; 4 and 5 what those rows
// are multiplied from, 6 and 7 two times 16 columns to multiply with. Include from *amx.cc files only.
//
// gcc 12's own functions do not say that they read and write memory: stores before them could be left out.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vai {
namespace {

constexpr int kTileColumns = 32, kTileRows = 16, kTileBytes = 1024;

struct alignas(64) TileConfig { uint8_t bytes[64]; };

void configure(int first_rows, int second_rows) {
  TileConfig config{};
  config.bytes[0] = 1;  // the palette of eight tiles
  for (int tile = 0; tile < 8; ++tile) {
    config.bytes[16 + 2 * tile] = 64;
    const bool second = tile == 2 || tile == 3 || tile == 5;
    config.bytes[48 + tile] = uint8_t(tile >= 6 ? kTileRows : second ? second_rows : first_rows);
  }
  asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
}

template <int tile>
inline void zero() { asm volatile("tilezero %%tmm%c0" ::"i"(tile)); }

template <int tile>
inline void load(const void* p, size_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(tile) : "memory");
}

template <int tile>
inline void load_passing(const void* p, size_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(tile) : "memory");
}

template <int tile>
inline void store(void* p, size_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(tile) : "memory");
}

template <int sums, int activations, int weights>
inline void multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(activations), "i"(weights));
}

}  // namespace
}  // namespace vai
