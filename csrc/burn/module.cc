// vai.burn._pack: checkpoint rows -> the ROM's tiles with the proof in the same pass, tiles -> rows, and the two other
// loops of a burn that are hot: the hashes of chunks, and the hundred thousands of strings of a vocabulary.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>

#include "sha256.h"
#include "tiles.h"

namespace nb = nanobind;
using namespace vai::burn;

namespace {

constexpr std::size_t kMaxExtent = std::size_t{1} << 31;  // rows or columns: no product below can overflow

// A Python object's bytes for as long as this lives.
class Buffer {
 public:
  Buffer(nb::handle object, int flags) {
    if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) throw nb::python_error();
  }
  ~Buffer() { PyBuffer_Release(&view_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  std::uint8_t* data() const { return static_cast<std::uint8_t*>(view_.buf); }
  std::size_t size() const { return static_cast<std::size_t>(view_.len); }

 private:
  Py_buffer view_;
};

// In the order of Type.
constexpr const char* kQuantized[] = {
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4", "Q2_K", "Q3_K",
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0"};
static_assert(std::size(kQuantized) == static_cast<std::size_t>(Type::kF16));

Type type_of(const std::string& name, bool vector) {
  if (name == "F32") return vector ? Type::kVectorF32 : Type::kF32;
  if (name == "F16") return vector ? Type::kVectorF16 : Type::kF16;
  if (name == "BF16") return vector ? Type::kVectorBF16 : Type::kF16;
  if (!vector)
    for (std::size_t i = 0; i < std::size(kQuantized); ++i)
      if (name == kQuantized[i]) return static_cast<Type>(i);
  throw std::invalid_argument("no such source type: " + name);
}

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

// A logical tensor inside a stored one: its source, and which blocks of 16 stored rows are its own.
struct Part {
  Type type;
  const std::uint8_t* source;
  std::size_t rows, columns, first_block, block_step;

  std::size_t blocks() const { return (rows + kLanes - 1) / kLanes; }
  std::size_t tiles() const { return (columns + layout_of(type).columns - 1) / layout_of(type).columns; }
  std::size_t block_bytes() const { return tiles() * layout_of(type).tile_bytes; }
  Rows lanes(std::size_t block) const {
    const std::size_t bytes = row_bytes(type, columns);
    return {source + block * kLanes * bytes, bytes, std::min(kLanes, rows - block * kLanes)};
  }
};

// Tiles [first, last) of one block into `target`, packed and proved a few at a time while they are in cache.
bool write_tiles(Type type, const Rows& rows, std::size_t first, std::size_t last, std::uint8_t* target) {
  const std::size_t tile_bytes = layout_of(type).tile_bytes, batch = 16384 / tile_bytes;
  for (; first < last; first += batch, target += batch * tile_bytes) {
    const std::size_t end = std::min(first + batch, last);
    pack_tiles(type, rows, first, end, target);
    if (!holds(type, rows, first, end, target)) return false;
  }
  return true;
}

// Bytes [low, high) of tile `tile`, of which the window holds only these.
bool write_edge(Type type, const Rows& rows, std::size_t tile, std::size_t low, std::size_t high,
                std::uint8_t* target) {
  std::uint8_t whole[kLargestTile];
  pack_tiles(type, rows, tile, tile + 1, whole);
  std::memcpy(target, whole + low, high - low);
  return holds(type, rows, tile, tile + 1, whole) && std::memcmp(target, whole + low, high - low) == 0;
}

// Bytes [low, high) of one block of 16 rows into `target`.
bool write_block(const Part& part, std::size_t block, std::size_t low, std::size_t high, std::uint8_t* target) {
  const std::size_t tile_bytes = layout_of(part.type).tile_bytes;
  const Rows rows = part.lanes(block);
  bool good = true;
  if (const std::size_t inside = low % tile_bytes; inside != 0) {
    const std::size_t tile = low / tile_bytes, end = std::min(tile_bytes, high - tile * tile_bytes);
    good = write_edge(part.type, rows, tile, inside, end, target);
    low += end - inside;
    target += end - inside;
  }
  if (low >= high) return good;
  const std::size_t first = low / tile_bytes, last = high / tile_bytes;
  good &= write_tiles(part.type, rows, first, last, target);
  if (const std::size_t left = high % tile_bytes; left != 0) {
    good &= write_edge(part.type, rows, last, 0, left, target + (last - first) * tile_bytes);
  }
  return good;
}

bool write_part(const Part& part, std::size_t start, std::uint8_t* window, std::size_t size) {
  const std::size_t bytes = part.block_bytes();
  const std::size_t stored = start / bytes;
  std::size_t block = stored <= part.first_block ? 0 : (stored - part.first_block) / part.block_step;
  for (; block < part.blocks(); ++block) {
    const std::size_t begin = (part.first_block + block * part.block_step) * bytes;
    if (begin >= start + size) break;
    const std::size_t low = std::max(begin, start), high = std::min(begin + bytes, start + size);
    if (low < high && !write_block(part, block, low - begin, high - begin, window + (low - start))) return false;
  }
  return true;
}

void check(const Part& part, std::size_t source_bytes) {
  require(part.rows > 0 && part.rows < kMaxExtent && part.columns > 0 && part.columns < kMaxExtent, "no such shape");
  require(part.first_block < kMaxExtent && part.block_step > 0 && part.block_step < 1024, "no such blocks");
  const Layout k = layout_of(part.type);
  require(!is_quantized(part.type) || part.columns % k.group_columns == 0, "columns are not whole groups");
  require(part.rows <= source_bytes / row_bytes(part.type, part.columns), "the source is shorter than its shape");
}

bool fill(const std::string& type, bool vector, nb::handle source, std::size_t rows, std::size_t columns,
          std::size_t first_block, std::size_t block_step, std::size_t start, nb::handle window) {
  const Buffer from(source, PyBUF_SIMPLE), to(window, PyBUF_WRITABLE);
  const Part part{type_of(type, vector), from.data(), rows, columns, first_block, block_step};
  check(part, from.size());
  require(start < std::size_t{1} << 62, "no such offset");
  const nb::gil_scoped_release release;
  return write_part(part, start, to.data(), to.size());
}

bool proved(const std::string& type, bool vector, nb::handle source, std::size_t rows, std::size_t columns,
            std::size_t first_block, std::size_t block_step, nb::handle stored) {
  const Buffer from(source, PyBUF_SIMPLE), packed(stored, PyBUF_SIMPLE);
  const Part part{type_of(type, vector), from.data(), rows, columns, first_block, block_step};
  check(part, from.size());
  require(first_block + (part.blocks() - 1) * block_step < packed.size() / part.block_bytes(), "no such blocks");
  const nb::gil_scoped_release release;
  for (std::size_t block = 0; block < part.blocks(); ++block) {
    const std::uint8_t* tiles = packed.data() + (first_block + block * block_step) * part.block_bytes();
    if (!holds(part.type, part.lanes(block), 0, part.tiles(), tiles)) return false;
  }
  return true;
}

nb::bytes unpack(const std::string& type, bool vector, nb::handle stored, std::size_t rows, std::size_t columns,
                 std::size_t first_block, std::size_t block_step) {
  const Buffer from(stored, PyBUF_SIMPLE);
  const Part part{type_of(type, vector), nullptr, rows, columns, first_block, block_step};
  check(part, SIZE_MAX);
  const std::size_t bytes = row_bytes(part.type, columns);
  require(first_block + (part.blocks() - 1) * block_step < from.size() / part.block_bytes(), "no such blocks");
  PyObject* raw = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(rows * bytes));
  if (raw == nullptr) throw nb::python_error();
  auto* out = reinterpret_cast<std::uint8_t*>(PyBytes_AS_STRING(raw));
  {
    const nb::gil_scoped_release release;
    for (std::size_t block = 0; block < part.blocks(); ++block) {
      unpack_rows(part.type, from.data() + (first_block + block * block_step) * part.block_bytes(), bytes,
                  std::min(kLanes, rows - block * kLanes), out + block * kLanes * bytes);
    }
  }
  return nb::steal<nb::bytes>(raw);
}

bool can_hash() {
#if defined(__x86_64__)
  return has_sha256();
#else
  return false;
#endif
}

nb::bytes hash_each([[maybe_unused]] nb::handle data, std::size_t piece) {
  if (!can_hash()) throw std::runtime_error("this processor has no instructions for SHA-256");
  require(piece > 0, "no such piece");
#if defined(__x86_64__)
  const Buffer from(data, PyBUF_SIMPLE);
  const std::size_t count = from.size() / piece + (from.size() % piece != 0);
  PyObject* raw = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(count * kDigest));
  if (raw == nullptr) throw nb::python_error();
  auto* out = reinterpret_cast<std::uint8_t*>(PyBytes_AS_STRING(raw));
  {
    const nb::gil_scoped_release release;
    sha256_each(from.data(), from.size(), piece, out);
  }
  return nb::steal<nb::bytes>(raw);
#endif
}

// GGUF strings (a little-endian 64-bit length before each) at bytes [position, end) of a buffer.
nb::tuple strings(nb::handle buffer, std::size_t position, std::size_t end, std::size_t count, std::size_t limit) {
  const Buffer from(buffer, PyBUF_SIMPLE);
  require(position <= end && end <= from.size() && count <= (end - position) / sizeof(std::uint64_t), "no such range");
  auto list = nb::steal<nb::list>(PyList_New(static_cast<Py_ssize_t>(count)));
  if (!list.is_valid()) throw nb::python_error();
  for (std::size_t i = 0; i < count; ++i) {
    std::uint64_t length = 0;
    if (end - position < sizeof length) throw nb::index_error("the file ends");
    std::memcpy(&length, from.data() + position, sizeof length);
    position += sizeof length;
    if (length > limit || length > end - position) throw nb::value_error(std::to_string(length).c_str());
    const char* text = reinterpret_cast<const char*>(from.data() + position);
    PyObject* decoded = PyUnicode_DecodeUTF8(text, static_cast<Py_ssize_t>(length), nullptr);
    if (decoded == nullptr) throw nb::python_error();
    PyList_SET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i), decoded);
    position += length;
  }
  return nb::make_tuple(list, position);
}

}  // namespace

NB_MODULE(_pack, m) {
  m.doc() = "VAI's packers: checkpoint rows -> ROM tiles and back. Sizes are bytes; the interpreter lock is released.";
  m.def("fill", &fill, nb::arg("type"), nb::arg("vector"), nb::arg("source"), nb::arg("rows"), nb::arg("columns"),
        nb::arg("first_block"), nb::arg("block_step"), nb::arg("start"), nb::arg("window"),
        "Write this part's share of bytes [start, start + len(window)) of a stored tensor, and prove it: False where\n"
        "what is stored differs from the source. ValueError for shapes that do not fit the source.");
  m.def("proved", &proved, nb::arg("type"), nb::arg("vector"), nb::arg("source"), nb::arg("rows"),
        nb::arg("columns"), nb::arg("first_block"), nb::arg("block_step"), nb::arg("stored"),
        "Whether the whole stored tensor holds this part bit for bit: the proof that fill() makes, on its own.");
  m.def("unpack", &unpack, nb::arg("type"), nb::arg("vector"), nb::arg("stored"), nb::arg("rows"), nb::arg("columns"),
        nb::arg("first_block"), nb::arg("block_step"), "The source bytes of a part, from the whole stored tensor.");
  m.def("can_hash", &can_hash, "Whether this processor has instructions for SHA-256, and with them hash_each.");
  m.def("hash_each", &hash_each, nb::arg("data"), nb::arg("piece"),
        "SHA-256 of each `piece` bytes of `data`, the last being what is left, one after the other.");
  m.def("strings", &strings, nb::arg("buffer"), nb::arg("position"), nb::arg("end"), nb::arg("count"), nb::arg("limit"),
        "(`count` GGUF strings from `position` on, where the last one ends). IndexError where they go past `end`,\n"
        "ValueError with the length of a string over `limit` or the end, UnicodeDecodeError for what is not UTF-8.");
}
