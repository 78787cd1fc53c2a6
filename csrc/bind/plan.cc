// Plans: built instruction by instruction from Python, run in one call with the interpreter lock released.
#include "core/plan.h"

#include <tuple>

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "bind/bind.h"
#include "core/fast.h"

namespace nb = nanobind;
using vai::Place;
using vai::Plan;
using vai::Where;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Pool = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Times = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// What Python hands over is plain tuples.
using PlaceOf = std::tuple<size_t, size_t>;
using WeightOf = std::tuple<size_t, int, int, int, int, int>;
using VectorOf = std::tuple<size_t, size_t, int, int>;
using WhereOf = std::tuple<bool, bool, int>;
using RoutedOf = std::tuple<size_t, int, int>;

template <class T, class U>
T made(const U& tuple) {
  return std::apply([](auto... v) { return T{v...}; }, tuple);
}
template <class T, class U>
std::optional<T> made(const std::optional<U>& tuple) {
  return tuple ? std::optional<T>(made<T>(*tuple)) : std::nullopt;
}

vai::KvType kv_type_of(const std::string& name) {
  if (name == "bf16") return vai::KvType::kBf16;
  if (name == "f32") return vai::KvType::kF32;
  if (name == "q8_0") return vai::KvType::kQ8_0;
  throw nb::value_error("no such KV type");
}

const vai::Fast& fast_by_name(const std::string& name) {
  for (const vai::Fast* fast : vai::available_fasts())
    if (fast->name == name) return *fast;
  throw std::invalid_argument("this machine has no fast kind called " + name);
}

nb::object forward(nb::handle self, const Ints& tokens, const Ints& positions, const Ints& seq_start, const Ints& context,
                   const std::vector<Table>& tables, const Ints& output_rows, const Pool& pool, const std::optional<Times>& seconds) {
  Plan& plan = nb::cast<Plan&>(self);
  vai::Step step{tokens.data(), positions.data(), seq_start.data(), context.data(), output_rows.data(),
                 tokens.size(), positions.size(), seq_start.size(), context.size(), output_rows.size(),
                 {},            pool.data(),      pool.size(),      seconds ? seconds->data() : nullptr,
                 seconds ? seconds->size() : 0};
  for (const Table& table : tables) step.tables.push_back({table.data(), table.shape(0), table.shape(1)});
  {
    const nb::gil_scoped_release released;
    plan.check(step);
    plan.run(step);
  }
  return nb::cast(nb::ndarray<nb::numpy, float, nb::ndim<2>>(plan.result_data(), {plan.result_rows(step), plan.result_columns()},
                                                             self, {int64_t(plan.result_width()), 1}));
}

}  // namespace

void bind_plan(nb::module_& m) {
  nb::class_<vai::Workspace>(m, "Workspace").def(nb::init<size_t>(), nb::arg("bytes"));
  nb::class_<Plan>(m, "Plan")
      .def(
          "__init__",
          [](Plan* self, vai::Workers& workers, const std::string& isa, const std::optional<std::string>& fast, const Bytes& data,
             vai::Workspace& workspace, int max_rows, int max_outputs, int vocabulary, int context, const std::string& kv_type,
             const std::vector<std::tuple<int, int, int, int>>& groups) {
            vai::PlanShape shape{max_rows, max_outputs, vocabulary, context, kv_type_of(kv_type), {}};
            for (const auto& group : groups) shape.groups.push_back(made<vai::GroupShape>(group));
            const vai::Fast* kind = fast ? &fast_by_name(*fast) : nullptr;
            new (self) Plan(workers, isa_by_name(isa.c_str()), kind, data.data(), data.size(), workspace, std::move(shape));
          },
          nb::keep_alive<1, 2>(), nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>(), nb::kw_only(), nb::arg("workers"), nb::arg("isa"),
          nb::arg("fast").none(), nb::arg("data").noconvert(), nb::arg("workspace"), nb::arg("max_rows"), nb::arg("max_outputs"),
          nb::arg("vocabulary"), nb::arg("context"), nb::arg("kv_type"), nb::arg("groups"))
      .def("embed", [](Plan& p, WeightOf table, float scale, PlaceOf out, WhereOf where) {
             p.embed(made<vai::Weight>(table), scale, made<Place>(out), made<Where>(where));
           }, nb::kw_only(), nb::arg("table"), nb::arg("scale"), nb::arg("out"), nb::arg("where"))
      .def("norm", [](Plan& p, PlaceOf x, int heads, int columns, std::optional<VectorOf> weight, float epsilon,
                      std::optional<PlaceOf> residual, std::optional<PlaceOf> out,
                      std::optional<size_t> packed32, std::optional<size_t> packed256, WhereOf where) {
             p.norm(made<Place>(x), heads, columns, made<vai::Vector>(weight), epsilon, made<Place>(residual), made<Place>(out), packed32,
                    packed256, made<Where>(where));
           }, nb::kw_only(), nb::arg("x"), nb::arg("heads"), nb::arg("columns"), nb::arg("weight").none(), nb::arg("epsilon"),
           nb::arg("residual").none(), nb::arg("out").none(),
           nb::arg("packed32").none(), nb::arg("packed256").none(), nb::arg("where"))
      .def("narrow", [](Plan& p, PlaceOf x, int columns, size_t out, WhereOf where) {
             p.narrow(made<Place>(x), columns, out, made<Where>(where));
           }, nb::kw_only(), nb::arg("x"), nb::arg("columns"), nb::arg("out"), nb::arg("where"))
      .def("linear", [](Plan& p, WeightOf weight, int blocks, std::optional<PlaceOf> x, std::optional<size_t> packed,
                        std::optional<size_t> narrow, std::optional<size_t> scratch, std::optional<VectorOf> bias,
                        std::optional<PlaceOf> addend, std::optional<PlaceOf> residual, std::optional<PlaceOf> out,
                        std::optional<size_t> narrow_out, bool gated, int act, float softcap, WhereOf where) {
             p.linear(made<vai::Weight>(weight), blocks, made<Place>(x), packed, narrow, scratch, made<vai::Vector>(bias),
                      made<Place>(addend), made<Place>(residual), made<Place>(out), narrow_out, gated, act, softcap, made<Where>(where));
           }, nb::kw_only(), nb::arg("weight"), nb::arg("blocks"), nb::arg("x").none(), nb::arg("packed").none(),
           nb::arg("narrow").none(), nb::arg("scratch").none(), nb::arg("bias").none(), nb::arg("addend").none(), nb::arg("residual").none(), nb::arg("out").none(),
           nb::arg("narrow_out").none(), nb::arg("gated"), nb::arg("act"), nb::arg("softcap"), nb::arg("where"))
      .def("glu", [](Plan& p, PlaceOf gate, PlaceOf up, int act, int columns, PlaceOf out, WhereOf where) {
             p.glu(made<Place>(gate), made<Place>(up), act, columns, made<Place>(out), made<Where>(where));
           }, nb::kw_only(), nb::arg("gate"), nb::arg("up"), nb::arg("act"), nb::arg("columns"), nb::arg("out"), nb::arg("where"))
      .def("angles", [](Plan& p, std::vector<double> frequencies, float magnitude, size_t out, WhereOf where) {
             p.angles(std::move(frequencies), magnitude, out, made<Where>(where));
           }, nb::kw_only(), nb::arg("frequencies"), nb::arg("magnitude"), nb::arg("out"), nb::arg("where"))
      .def("rope", [](Plan& p, PlaceOf x, PlaceOf out, int heads, int head_dim, int pairs, bool neox, size_t angles, WhereOf where) {
             p.rope(made<Place>(x), made<Place>(out), heads, head_dim, pairs, neox, angles, made<Where>(where));
           }, nb::kw_only(), nb::arg("x"), nb::arg("out"), nb::arg("heads"), nb::arg("head_dim"), nb::arg("pairs"), nb::arg("neox"),
           nb::arg("angles"), nb::arg("where"))
      .def("kv_write", [](Plan& p, PlaceOf k, PlaceOf v, int group, int layer, WhereOf where) {
             p.kv_write(made<Place>(k), made<Place>(v), group, layer, made<Where>(where));
           }, nb::kw_only(), nb::arg("k"), nb::arg("v"), nb::arg("group"), nb::arg("layer"), nb::arg("where"))
      .def("attention", [](Plan& p, PlaceOf q, PlaceOf out, int group, int layer, int heads, float scale, int window, float softcap,
                           size_t scratch, WhereOf where) {
             p.attention(made<Place>(q), made<Place>(out), group, layer, heads, scale, window, softcap, scratch, made<Where>(where));
           }, nb::kw_only(), nb::arg("q"), nb::arg("out"), nb::arg("group"), nb::arg("layer"), nb::arg("heads"), nb::arg("scale"),
           nb::arg("window"), nb::arg("softcap"), nb::arg("scratch"), nb::arg("where"))
      .def("route", [](Plan& p, PlaceOf logits, RoutedOf routed, bool renormalize, float scale, WhereOf where) {
             p.route(made<Place>(logits), made<vai::Routed>(routed), renormalize, scale, made<Where>(where));
           }, nb::kw_only(), nb::arg("logits"), nb::arg("routed"), nb::arg("renormalize"), nb::arg("scale"), nb::arg("where"))
      .def("sort", [](Plan& p, RoutedOf routed, WhereOf where) { p.sort(made<vai::Routed>(routed), made<Where>(where)); },
           nb::kw_only(), nb::arg("routed"), nb::arg("where"))
      .def("expert_rows", [](Plan& p, PlaceOf x, int columns, RoutedOf routed, bool gathered, std::optional<PlaceOf> out,
                             std::optional<size_t> packed32, std::optional<size_t> packed256, WhereOf where) {
             p.expert_rows(made<Place>(x), columns, made<vai::Routed>(routed), gathered, made<Place>(out), packed32, packed256,
                           made<Where>(where));
           }, nb::kw_only(), nb::arg("x"), nb::arg("columns"), nb::arg("routed"), nb::arg("gathered"), nb::arg("out").none(),
           nb::arg("packed32").none(), nb::arg("packed256").none(), nb::arg("where"))
      .def("expert_linear", [](Plan& p, WeightOf weight, int blocks, std::optional<PlaceOf> x, std::optional<size_t> packed, PlaceOf out,
                               bool gated, RoutedOf routed, WhereOf where) {
             p.expert_linear(made<vai::Weight>(weight), blocks, made<Place>(x), packed, made<Place>(out), gated,
                             made<vai::Routed>(routed), made<Where>(where));
           }, nb::kw_only(), nb::arg("weight"), nb::arg("blocks"), nb::arg("x").none(), nb::arg("packed").none(), nb::arg("out"),
           nb::arg("gated"), nb::arg("routed"), nb::arg("where"))
      .def("expert_sum", [](Plan& p, PlaceOf x, int columns, RoutedOf routed, std::optional<PlaceOf> residual, PlaceOf out, WhereOf where) {
             p.expert_sum(made<Place>(x), columns, made<vai::Routed>(routed), made<Place>(residual), made<Place>(out), made<Where>(where));
           }, nb::kw_only(), nb::arg("x"), nb::arg("columns"), nb::arg("routed"), nb::arg("residual").none(), nb::arg("out"),
           nb::arg("where"))
      .def("gated_add", [](Plan& p, PlaceOf x, int columns, PlaceOf gate, int gate_columns, VectorOf weight, PlaceOf residual, PlaceOf out,
                           WhereOf where) {
             p.gated_add(made<Place>(x), columns, made<Place>(gate), gate_columns, made<vai::Vector>(weight), made<Place>(residual),
                         made<Place>(out), made<Where>(where));
           }, nb::kw_only(), nb::arg("x"), nb::arg("columns"), nb::arg("gate"), nb::arg("gate_columns"), nb::arg("weight"),
           nb::arg("residual"), nb::arg("out"), nb::arg("where"))
      .def("rows", [](Plan& p, PlaceOf x, int columns, PlaceOf out, WhereOf where) {
             p.rows(made<Place>(x), columns, made<Place>(out), made<Where>(where));
           }, nb::kw_only(), nb::arg("x"), nb::arg("columns"), nb::arg("out"), nb::arg("where"))
      .def("result", [](Plan& p, PlaceOf out, int columns, bool of_outputs) { p.result(made<Place>(out), columns, of_outputs); },
           nb::kw_only(), nb::arg("out"), nb::arg("columns"), nb::arg("of_outputs"))
      .def("forward", &forward, nb::arg("tokens").noconvert(), nb::arg("positions").noconvert(), nb::arg("seq_start").noconvert(),
           nb::arg("context").noconvert(), nb::arg("tables").noconvert(), nb::arg("output_rows").noconvert(),
           nb::arg("pool").noconvert(), nb::arg("seconds").noconvert().none() = nb::none());
}
