// SHA-256 with the SHA extensions of x86: see sha256.h. The names of variables are those of FIPS 180-4, section 6.2.
#include <cpuid.h>
#include <immintrin.h>
#include <string.h>

#include "sha256.h"

namespace vai::burn {
namespace {

constexpr std::size_t kBlock = 64;

alignas(16) constexpr std::uint32_t kRounds[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

// The hash value in the order the instructions want it: (F, E, B, A) and (H, G, D, C), lowest lane first.
struct State {
  __m128i abef = _mm_set_epi32(0x6a09e667, static_cast<int>(0xbb67ae85), 0x510e527f, static_cast<int>(0x9b05688c));
  __m128i cdgh = _mm_set_epi32(0x3c6ef372, static_cast<int>(0xa54ff53a), 0x1f83d9ab, 0x5be0cd19);
};

// `blocks` blocks of each of N messages, whose instructions the processor overlaps.
template <std::size_t N>
void compress(State* states, const std::uint8_t* const* messages, std::size_t blocks) {
  const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  for (std::size_t block = 0; block < blocks; ++block) {
    __m128i abef[N], cdgh[N], w[N][4];
#pragma GCC unroll 2
    for (std::size_t n = 0; n < N; ++n) {
      abef[n] = states[n].abef;
      cdgh[n] = states[n].cdgh;
      const auto* from = reinterpret_cast<const __m128i*>(messages[n] + block * kBlock);
#pragma GCC unroll 4
      for (std::size_t i = 0; i < 4; ++i) w[n][i] = _mm_shuffle_epi8(_mm_loadu_si128(from + i), big_endian);
    }
#pragma GCC unroll 16
    for (std::size_t i = 0; i < 16; ++i) {  // four rounds each
      const __m128i k = _mm_load_si128(reinterpret_cast<const __m128i*>(kRounds) + i);
#pragma GCC unroll 2
      for (std::size_t n = 0; n < N; ++n) {
        const __m128i wk = _mm_add_epi32(w[n][i % 4], k);
        cdgh[n] = _mm_sha256rnds2_epu32(cdgh[n], abef[n], wk);
        abef[n] = _mm_sha256rnds2_epu32(abef[n], cdgh[n], _mm_shuffle_epi32(wk, 0x0e));
        if (i < 12) {  // the words of four rounds, 16 rounds on
          const __m128i middle = _mm_alignr_epi8(w[n][(i + 3) % 4], w[n][(i + 2) % 4], 4);
          const __m128i sum = _mm_add_epi32(_mm_sha256msg1_epu32(w[n][i % 4], w[n][(i + 1) % 4]), middle);
          w[n][i % 4] = _mm_sha256msg2_epu32(sum, w[n][(i + 3) % 4]);
        }
      }
    }
#pragma GCC unroll 2
    for (std::size_t n = 0; n < N; ++n) {
      states[n].abef = _mm_add_epi32(states[n].abef, abef[n]);
      states[n].cdgh = _mm_add_epi32(states[n].cdgh, cdgh[n]);
    }
  }
}

void put_big_endian(std::uint64_t value, std::size_t bytes, std::uint8_t* out) {
  for (std::size_t i = 0; i < bytes; ++i) out[i] = static_cast<std::uint8_t>(value >> 8 * (bytes - 1 - i));
}

// What is behind the last whole block of a message, padded as section 5.1.1 says; then the digest.
void finish(State state, const std::uint8_t* message, std::size_t bytes, std::uint8_t* digest) {
  std::uint8_t last[2 * kBlock] = {};
  const std::size_t rest = bytes % kBlock, blocks = rest + 9 > kBlock ? 2 : 1;
  if (rest != 0) memcpy(last, message + (bytes - rest), rest);
  last[rest] = 0x80;
  put_big_endian(std::uint64_t{bytes} * 8, 8, last + blocks * kBlock - 8);
  const std::uint8_t* const padded = last;
  compress<1>(&state, &padded, blocks);
  std::uint32_t feba[4], hgdc[4];
  memcpy(feba, &state.abef, sizeof feba);
  memcpy(hgdc, &state.cdgh, sizeof hgdc);
  const std::uint32_t words[8] = {feba[3], feba[2], hgdc[3], hgdc[2], feba[1], feba[0], hgdc[1], hgdc[0]};
  for (std::size_t i = 0; i < 8; ++i) put_big_endian(words[i], 4, digest + 4 * i);
}

template <std::size_t N>
void digest(const std::uint8_t* const* messages, std::size_t bytes, std::uint8_t* out) {
  State states[N];
  compress<N>(states, messages, bytes / kBlock);
  for (std::size_t n = 0; n < N; ++n) finish(states[n], messages[n], bytes, out + n * kDigest);
}

}  // namespace

bool has_sha256() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0 || (ecx & bit_SSE4_1) == 0) return false;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (ebx & (1u << 29)) != 0;
}

void sha256_each(const std::uint8_t* data, std::size_t bytes, std::size_t piece, std::uint8_t* out) {
  for (; bytes >= 2 * piece; data += 2 * piece, bytes -= 2 * piece, out += 2 * kDigest) {
    const std::uint8_t* const two[2] = {data, data + piece};
    digest<2>(two, piece, out);
  }
  if (bytes > piece) {
    digest<1>(&data, piece, out);
    data += piece, bytes -= piece, out += kDigest;
  }
  if (bytes > 0) digest<1>(&data, bytes, out);
}

}  // namespace vai::burn
