// AMX's tiles as the fast kind uses them: 0 and 1 are sums of up to 16 rows, 2 what those rows are multiplied from, 3 the 16
// columns to multiply with. Include from *amx.cc files only.
#pragma once

#include <immintrin.h>

#include "ops/fast/tile_instructions.h"

namespace vai {
namespace {

constexpr int kTileColumns = 32, kTileRows = 16, kTileBytes = 1024;

inline void configure(int rows) {
  alignas(64) uint8_t config[64] = {1};  // the palette of eight tiles
  for (int tile = 0; tile < 4; ++tile) {
    config[16 + 2 * tile] = 64;
    config[48 + tile] = uint8_t(tile == 3 ? kTileRows : rows);
  }
  load_config(config);
}

// 32 columns of a row as a line of a row that is multiplied from, rounded as below.
inline __attribute__((always_inline)) void put_line(__m512 low, __m512 high, void* out) {
  _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

// The order of a row of what is multiplied with, [16][2], in two rows of which the second begins at `second`: 0 second 1 ...
inline __attribute__((always_inline)) __m512i paired(int second) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_add_epi32(_mm512_or_si512(lane, _mm512_slli_epi32(lane, 16)), _mm512_set1_epi32(second << 16));
}

// Two rows of 16 as such a row, rounded to bfloat16: nearest, half to even, subnormal numbers as zeros.
inline __attribute__((always_inline)) void put_pair(__m512 even, __m512 odd, void* out) {
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(paired(16), (__m512i)_mm512_cvtne2ps_pbh(odd, even)));
}

// The same of what is bfloat16 already. What is subnormal stays so: tiles are multiplied as if it were zero.
inline __attribute__((always_inline)) void put_pair(__m512i rows, void* out) {
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(paired(16), rows));
}

inline __attribute__((always_inline)) void put_pair(__m256i even, __m256i odd, void* out) {
  _mm512_storeu_si512(out, _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16)));
}

// Of two rows of 32: the first 16 columns, and the others.
inline __attribute__((always_inline)) void put_pairs(__m512i even, __m512i odd, void* first, void* second) {
  const __m512i later = _mm512_add_epi32(paired(32), _mm512_set1_epi32(16 << 16 | 16));
  _mm512_storeu_si512(first, _mm512_permutex2var_epi16(even, paired(32), odd));
  _mm512_storeu_si512(second, _mm512_permutex2var_epi16(even, later, odd));
}

}  // namespace
}  // namespace vai
