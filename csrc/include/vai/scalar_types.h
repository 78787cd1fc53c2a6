// The narrow float types as single values: exact conversions, the same on every machine.
//
// Everything here is `static`: translation units are compiled for different instruction sets, and the linker must never
// take a function compiled for one of them into another.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

namespace vai {

static inline float f16_to_f32(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return std::bit_cast<float>(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  const float magnitude = float(int(mantissa)) * 0x1p-24f;  // subnormal: exact in binary32
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
}

static inline float bf16_to_f32(uint16_t h) { return std::bit_cast<float>(uint32_t(h) << 16); }

// The scale of an MXFP4 block, 2^(e - 128): half of what OCP's E8M0 says, as its codes stand for twice their values.
static inline float e8m0_to_f32(uint8_t e) {
  return std::bit_cast<float>(e < 2 ? 0x00200000u << e : uint32_t(e - 1) << 23);
}

// Round to nearest even; a NaN stays a NaN.
static inline uint16_t f32_to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40u);
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// The same, but what is subnormal becomes a zero of its sign, as AMX and AVX512-BF16 have it.
static inline uint16_t f32_to_bf16_flushed(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), size = bits & 0x7fffffffu;
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, quiet = (bits >> 16) | 0x40u;
  return uint16_t(size > 0x7f800000u ? quiet : size < 0x00800000u ? (bits >> 16) & 0x8000u : rounded);
}

template <class T>
static inline T load_as(const void* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

}  // namespace vai
