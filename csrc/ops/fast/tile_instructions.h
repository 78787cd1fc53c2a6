// AMX's instructions as the tiles of the fast kind use them. Include from *amx.cc files only.
//
// gcc 12's own functions do not say that they read and write memory: stores before them could be left out.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vai {
namespace {

inline void load_config(const uint8_t (&config)[64]) { asm volatile("ldtilecfg %0" ::"m"(config) : "memory"); }

inline void release() { asm volatile("tilerelease" ::: "memory"); }

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

// The same of bytes, of which weights may be unsigned, to sums of 32 bits.
template <int sums, int activations, int weights, bool kUnsigned = false>
inline void dot() {
  if constexpr (kUnsigned)
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(activations), "i"(weights));
  else
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(activations), "i"(weights));
}

}  // namespace
}  // namespace vai
