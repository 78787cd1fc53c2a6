// The ceilings of the machine, measured by all workers of a pool at once.
#include "vai/ceilings.h"

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include "bind/bind.h"
#include "core/fast.h"
#include "core/workers.h"

namespace nb = nanobind;

namespace vai {

#define VAI_CEILINGS(name)                     \
  uint64_t multiply_int8_##name(int);          \
  uint64_t multiply_f32_##name(int);           \
  void read_##name(const uint8_t*, size_t);    \
  static const Ceilings k_##name{#name, multiply_int8_##name, multiply_f32_##name, read_##name};

VAI_CEILINGS(scalar)
#if defined(__x86_64__)
VAI_CEILINGS(avx2)
VAI_CEILINGS(avx512)
uint64_t multiply_bf16_amx(int);
#endif

}  // namespace vai

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Clock = std::chrono::steady_clock;

constexpr int kRounds = 4096;  // tens of microseconds: between two looks at the clock

const vai::Ceilings& ceilings(const std::string& name) {
  isa_by_name(name.c_str());  // throws where this machine has it not
#if defined(__x86_64__)
  if (name == vai::k_avx2.name) return vai::k_avx2;
  if (name == vai::k_avx512.name || name == "amx") return vai::k_avx512;  // beside which its tiles are to be seen
#endif
  return vai::k_scalar;
}

double seconds_since(Clock::time_point began) { return std::chrono::duration<double>(Clock::now() - began).count(); }

uint64_t (*tiles())(int) {
#if defined(__x86_64__)
  if (std::string(vai::available_fasts().back()->name) == "amx") return vai::multiply_bf16_amx;
#endif
  throw std::invalid_argument("this machine has no tiles");
}

double multiply_rate(vai::Workers& workers, const std::string& isa, const std::string& unit, double seconds) {
  if (!(seconds > 0 && seconds <= 10)) throw std::invalid_argument("a rate is measured for up to ten seconds");
  const auto loop = unit == "bf16" ? tiles() : unit == "int8" ? ceilings(isa).multiply_int8 : ceilings(isa).multiply_f32;
  const nb::gil_scoped_release released;
  std::atomic<uint64_t> made{0};
  const auto began = Clock::now();
  workers.run([&](int) {
    uint64_t own = 0;
    do own += loop(kRounds);  // at least once: a worker may come late
    while (seconds_since(began) < seconds);
    made += own;
  });
  return double(made) / seconds_since(began);
}

double read_rate(vai::Workers& workers, const std::string& isa, const Bytes& data) {
  const auto loop = ceilings(isa).read;
  const size_t share = data.size() / size_t(workers.count()) / 512 * 512;
  if (share == 0) throw std::invalid_argument("too few bytes to read");
  const nb::gil_scoped_release released;
  const auto began = Clock::now();
  workers.run([&](int worker) { loop(data.data() + size_t(worker) * share, share); });
  return double(share) * workers.count() / seconds_since(began);
}

}  // namespace

void bind_ceilings(nb::module_& m) {
  m.def("multiply_rate", &multiply_rate, nb::kw_only(), nb::arg("workers"), nb::arg("isa"), nb::arg("unit"), nb::arg("seconds"));
  m.def("read_rate", &read_rate, nb::kw_only(), nb::arg("workers"), nb::arg("isa"), nb::arg("data").noconvert());
}
