// The burner's packers: checkpoint rows -> the ROM's tiles, and back again for the proof.
#include <nanobind/nanobind.h>

NB_MODULE(_pack, m) { m.doc() = "VAI's packers."; }
