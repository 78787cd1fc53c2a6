// SHA-256 (FIPS 180-4) of equal pieces of memory, two at a time: one stream alone waits for its own rounds.
#pragma once
#include <cstddef>
#include <cstdint>

namespace vai::burn {

constexpr std::size_t kDigest = 32;

// Whether this processor has the instructions; without them nothing below may be called.
bool has_sha256();

// Digests of `data` in pieces of `piece` bytes, the last being what is left, one after the other at `out`.
void sha256_each(const std::uint8_t* data, std::size_t bytes, std::size_t piece, std::uint8_t* out);

}  // namespace vai::burn
