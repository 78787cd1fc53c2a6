// All rows of a step sampled in one call with the interpreter lock released.
#include <atomic>
#include <cfenv>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include "bind/bind.h"
#include "core/sampler.h"
#include "core/workers.h"

namespace nb = nanobind;

namespace {

template <class T>
using Column = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Masks = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Logits = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;
template <class T>
using Out = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using OutRows = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// The caller's thread may flush subnormals (another library set it so); ours must not while we compute.
class DefaultFloats {
 public:
  DefaultFloats() {
    fegetenv(&before_);
    fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloats() { fesetenv(&before_); }

 private:
  fenv_t before_;
};

// Entries of all rows, one row's after the other's: row r has [start[r], start[r + 1]).
template <class T>
struct Ragged {
  Ragged(const Column<int64_t>& start, const Column<int32_t>& ids, const Column<T>& values, size_t rows, size_t vocabulary)
      : start(start.data()), ids(ids.data()), values(values.data()) {
    bool sound = start.size() == rows + 1 && ids.size() == values.size() && this->start[0] == 0 &&
                 this->start[rows] == int64_t(ids.size());
    for (size_t r = 0; sound && r < rows; ++r) sound = this->start[r] <= this->start[r + 1];
    for (size_t i = 0; sound && i < ids.size(); ++i) sound = uint32_t(this->ids[i]) < vocabulary;
    if (!sound) throw std::invalid_argument("adjustments need ids of the vocabulary, in one range for each row");
  }
  int64_t count(size_t row) const { return start[row + 1] - start[row]; }

  const int64_t* start;
  const int32_t* ids;
  const T* values;
};

// Calls draw(row, scratch) for every row: on the pool's threads, each row by one of them, or on the caller's.
template <class Draw>
void each_row(vai::Workers* workers, size_t rows, const Draw& draw) {
  if (!workers || rows < 2) {
    const DefaultFloats defaults;
    vai::SampleScratch scratch;
    for (size_t r = 0; r < rows; ++r) draw(r, scratch);
    return;
  }
  std::atomic<size_t> next{0};
  std::vector<std::exception_ptr> failed(size_t(workers->count()));
  workers->run([&](int worker) {
    try {
      vai::SampleScratch scratch;
      for (size_t r; (r = next.fetch_add(1, std::memory_order_relaxed)) < rows;) draw(r, scratch);
    } catch (...) {
      failed[size_t(worker)] = std::current_exception();
    }
  });
  for (const std::exception_ptr& error : failed)
    if (error) std::rethrow_exception(error);
}

void sample(const std::string& isa, vai::Workers* workers, const Logits& logits, const Column<float>& temperature, const Column<int32_t>& top_k,
            const Column<float>& top_p, const Column<float>& min_p, const Column<uint64_t>& seed, const Column<uint32_t>& choice,
            const Column<uint32_t>& position, const Column<int32_t>& logprobs, const Column<float>& repetition,
            const Column<float>& presence, const Column<float>& frequency, const Column<int64_t>& bias_start,
            const Column<int32_t>& bias_ids, const Column<float>& biases, const Column<int64_t>& seen_start,
            const Column<int32_t>& seen_ids, const Column<int32_t>& made, const Masks& masks, const Column<int32_t>& mask_of,
            const Out<int32_t>& tokens, const Out<float>& logprob,
            const OutRows<int32_t>& top_ids, const OutRows<float>& top_logprobs) {
  const size_t rows = logits.shape(0), count = logits.shape(1), width = top_ids.shape(1);
  for (size_t n : {temperature.size(), top_k.size(), top_p.size(), min_p.size(), seed.size(), choice.size(), position.size(),
                   logprobs.size(), repetition.size(), presence.size(), frequency.size(), mask_of.size(), tokens.size(), logprob.size(),
                   top_ids.shape(0), top_logprobs.shape(0)})
    if (n != rows) throw std::invalid_argument("sampling needs one value for each row of logits");
  if (count == 0 || count > (size_t(1) << 30) || logits.stride(1) != 1 || top_logprobs.shape(1) != width)
    throw std::invalid_argument("the logits are no rows of a vocabulary");
  for (size_t r = 0; r < rows; ++r)
    if (logprobs.data()[r] > int32_t(width) || !(temperature.data()[r] >= 0.0f))
      throw std::invalid_argument("a row asks for too many alternatives or a negative temperature");
  const size_t mask_bytes = masks.shape(1);
  for (size_t r = 0; r < rows; ++r)
    if (mask_of.data()[r] < -1 || mask_of.data()[r] >= int64_t(masks.shape(0)) || mask_bytes < (count + 7) / 8)
      throw std::invalid_argument("a mask needs a bit for each token, and a row one of them or -1");
  const Ragged bias(bias_start, bias_ids, biases, rows, count);
  const Ragged seen(seen_start, seen_ids, made, rows, count);
  const vai::Isa& table = isa_by_name(isa.c_str());
  const nb::gil_scoped_release released;
  each_row(workers, rows, [&](size_t r, vai::SampleScratch& scratch) {
    const vai::SampleRow row{temperature.data()[r], top_k.data()[r],  top_p.data()[r],    min_p.data()[r],
                             seed.data()[r],        choice.data()[r], position.data()[r], logprobs.data()[r]};
    const vai::Adjustments adjustments{bias.ids + bias.start[r],
                                       bias.values + bias.start[r],
                                       bias.count(r),
                                       seen.ids + seen.start[r],
                                       seen.values + seen.start[r],
                                       seen.count(r),
                                       repetition.data()[r],
                                       presence.data()[r],
                                       frequency.data()[r],
                                       mask_of.data()[r] < 0 ? nullptr : masks.data() + size_t(mask_of.data()[r]) * mask_bytes};
    vai::SampleResult result{0, 0.0f, top_ids.data() + r * width, top_logprobs.data() + r * width};
    vai::sample_row(table, logits.data() + int64_t(r) * logits.stride(0), int(count), row, adjustments, scratch, result);
    tokens.data()[r] = result.token;
    logprob.data()[r] = result.logprob;
  });
}

}  // namespace

void bind_sample(nb::module_& m) {
  m.def("sample", &sample, nb::kw_only(), nb::arg("isa"), nb::arg("workers").none(), nb::arg("logits").noconvert(), nb::arg("temperature").noconvert(),
        nb::arg("top_k").noconvert(), nb::arg("top_p").noconvert(), nb::arg("min_p").noconvert(), nb::arg("seed").noconvert(),
        nb::arg("choice").noconvert(), nb::arg("position").noconvert(), nb::arg("logprobs").noconvert(),
        nb::arg("repetition").noconvert(), nb::arg("presence").noconvert(), nb::arg("frequency").noconvert(),
        nb::arg("bias_start").noconvert(), nb::arg("bias_ids").noconvert(), nb::arg("biases").noconvert(),
        nb::arg("seen_start").noconvert(), nb::arg("seen_ids").noconvert(), nb::arg("made").noconvert(),
        nb::arg("masks").noconvert(), nb::arg("mask_of").noconvert(),
        nb::arg("tokens").noconvert(), nb::arg("logprob").noconvert(), nb::arg("top_ids").noconvert(),
        nb::arg("top_logprobs").noconvert());
}
