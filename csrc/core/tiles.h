// AMX's tiles: whether the processor has them, and the operating system lends them.
#pragma once

namespace vai {

enum class TileUnit { kBf16, kInt8 };

// Whether the machine promises tiles for this unit, and AVX-512 beside them, and has granted them to this process.
bool tiles_promised(TileUnit unit);
// Asks the operating system for tiles; true if this process, its threads and its children may use them.
bool tiles_granted();

}  // namespace vai
