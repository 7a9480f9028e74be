#include "encoder_bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "cpu/dispatch.h"
#include "encoder.h"

namespace py = pybind11;

namespace fastffn {

int64_t Encoder::widest() const {
  int64_t most = 0;
  for (const auto& layer : layers)
    for (const Unit& unit : layer->units) most = std::max(most, unit.first.columns());
  return most;
}

namespace {

// Addresses of contiguous fp32 tensors; 0: absent.
using LinearTuple = std::tuple<uintptr_t, uintptr_t, int64_t>;               // weight, bias, n
using NormTuple = std::tuple<uintptr_t, uintptr_t, float>;                   // weight, bias, eps
using SegmentTuple = std::pair<std::optional<py::bytes>, std::vector<int>>;  // program, sources
// first product's parts, second's, I, prologue, middle, epilogue, norm
using UnitTuple = std::tuple<std::vector<LinearTuple>, LinearTuple, int64_t, SegmentTuple,
                             SegmentTuple, SegmentTuple, NormTuple>;

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

Precision precision_of(const std::string& name) {
  if (name == "float32") return Precision::kFloat;
  if (name == "bfloat16") return Precision::kBFloat16;
  require(name == "int8", "encoder: precision is float32, bfloat16 or int8");
  return Precision::kInt8;
}

const float* floats(uintptr_t address) { return reinterpret_cast<const float*>(address); }

PackedLinear linear(const std::vector<LinearTuple>& parts, int64_t k, Precision precision) {
  std::vector<LinearPart> given;
  for (const auto& [weight, bias, n] : parts) {
    require(weight && n > 0 && k > 0, "encoder: a linear layer without weights");
    given.push_back({floats(weight), floats(bias), n});
  }
  return PackedLinear(given, k, precision);
}

Norm norm(const NormTuple& tuple, int64_t n) {
  const auto& [weight, bias, eps] = tuple;
  const auto copy = [n](uintptr_t from, float absent) {
    return from ? std::vector<float>(floats(from), floats(from) + n)
                : std::vector<float>(n, absent);
  };
  return {copy(weight, 1), copy(bias, 0), eps};
}

Segment segment(const SegmentTuple& tuple, std::initializer_list<Source> allowed) {
  const auto& [packed, sources] = tuple;
  Segment result;
  if (packed) result.program = std::make_unique<Program>(std::string_view(*packed));
  for (const int source : sources) {
    const auto known = std::find(allowed.begin(), allowed.end(), static_cast<Source>(source));
    require(known != allowed.end(), "encoder: a segment reads what is not there");
    result.sources.push_back(*known);
  }
  if (packed) {
    const Code& code = result.program->code();
    require(static_cast<size_t>(code.inputs) == sources.size() && code.outputs == 1,
            "encoder: a segment's inputs");
    require(code.inputs < kMaxOperands && code.registers <= kMaxRegisters,
            "encoder: a program too large");
  }
  return result;
}

// Throws std::out_of_range for what would be read outside of a table.
void check(const Encoding& call) {
  const Embeddings& table = call.encoder->embeddings;
  const int64_t places = call.encoder->places;
  require(!call.ids || table.words, "encoder: no embeddings");
  const auto inside = [](const char* what, int64_t value, int64_t count) {
    if (value < 0 || value >= count)
      throw std::out_of_range(std::string(what) + " " + std::to_string(value) + ": the model has " +
                              std::to_string(count));
  };
  for (int64_t text = 0; text < call.texts; ++text) {
    const int64_t length = call.starts[text + 1] - call.starts[text];
    require(length >= 0, "encoder: starts fall");
    if (!call.places && length) inside("position", length - 1, places);
    if (call.bias && length) inside("position", length - 1, call.bias_length);
  }
  const int64_t tokens = call.starts[call.texts];
  for (int64_t row = 0; row < tokens && call.places; ++row)
    inside("position", call.places[row], places);
  for (int64_t row = 0; row < tokens && call.ids; ++row) {
    inside("token", call.ids[row], table.vocabulary);
    if (call.kinds && table.segments) inside("segment", call.kinds[row], table.kinds);
  }
}

class PyEncoder {
 public:
  PyEncoder(int64_t hidden, int64_t heads, int64_t head_size, const std::string& precision,
            bool pre_norm) {
    require(hidden > 0 && heads > 0 && heads * head_size == hidden, "encoder: heads");
    require(head_size <= kMaxHeadSize, "encoder: heads too wide");
    encoder_.precision = precision_of(precision);
    require(multiplies(encoder_.precision), "encoder: this processor does not multiply that");
    encoder_.hidden = hidden;
    encoder_.heads = heads;
    encoder_.pre_norm = pre_norm;
    encoder_.head_size = head_size;
  }

  // A layer after those that are there; returns its number. cosines, sines: [places, head / 2], not
  // copied; 0: no rotation.
  size_t add_layer(const std::vector<LinearTuple>& qkv, const LinearTuple& output, float scale,
                   const std::optional<NormTuple>& attention_norm,
                   const std::vector<UnitTuple>& units, uintptr_t cosines, uintptr_t sines,
                   int64_t places, int64_t window) {
    const int64_t hidden = encoder_.hidden;
    const Precision precision = encoder_.precision;
    require(qkv.size() == 3, "encoder: query, key and value");
    for (const LinearTuple& part : qkv)
      require(std::get<2>(part) == hidden, "encoder: width of query, key or value");
    require(std::get<2>(output) == hidden, "encoder: width of attention's output");
    auto layer = std::make_unique<Layer>();
    layer->qkv = linear(qkv, hidden, precision);
    layer->output = linear({output}, hidden, precision);
    layer->scale = scale;
    require(attention_norm || encoder_.pre_norm, "encoder: a layer without a norm");
    if (attention_norm) layer->norm = norm(*attention_norm, hidden);
    require(!cosines == !sines && (!cosines || encoder_.head_size % 2 == 0), "encoder: rotation");
    layer->cosines = floats(cosines);
    layer->sines = floats(sines);
    layer->window = window;
    if (cosines) encoder_.places = std::min(encoder_.places, places);
    for (const auto& [first, second, width, prologue, middle, epilogue, unit_norm] : units) {
      require(first.size() == 1 || first.size() == 2, "encoder: up, or up and gate");
      for (const auto& part : first)
        require(std::get<2>(part) == width, "encoder: the first product's width");
      require(std::get<2>(second) == hidden, "encoder: the second product's width");
      Unit unit;
      unit.first = linear(first, hidden, precision);
      unit.second = linear({second}, width, precision);
      unit.width = width;
      unit.prologue = segment(prologue, {Source::kInput});
      unit.middle = first.size() == 2
                        ? segment(middle, {Source::kFirst, Source::kGate, Source::kInput})
                        : segment(middle, {Source::kFirst, Source::kInput});
      const auto& reads = unit.middle.sources;
      require(
          width <= hidden || std::find(reads.begin(), reads.end(), Source::kInput) == reads.end(),
          "encoder: the input is narrower than what it meets");
      unit.epilogue = segment(epilogue, {Source::kSecond, Source::kInput});
      unit.norm = norm(unit_norm, hidden);
      layer->units.push_back(std::move(unit));
    }
    encoder_.layers.push_back(std::move(layer));
    encoder_.order.push_back(static_cast<int>(encoder_.layers.size()) - 1);
    return encoder_.layers.size() - 1;
  }

  void set_last_norm(const NormTuple& last) { encoder_.last = norm(last, encoder_.hidden); }

  void repeat_layer(size_t index) {
    require(index < encoder_.layers.size(), "encoder: no such layer");
    encoder_.order.push_back(static_cast<int>(index));
  }

  // Tables are not copied: the caller keeps them.
  void set_embeddings(uintptr_t words, int64_t vocabulary, int64_t width, bool trigram,
                      const std::optional<LinearTuple>& before, uintptr_t positions, int64_t places,
                      uintptr_t segments, int64_t kinds, const NormTuple& sum_norm,
                      const std::optional<LinearTuple>& after) {
    Embeddings& to = encoder_.embeddings;
    require(words && vocabulary > 0 && width > 0, "encoder: no embeddings");
    require(before || !trigram, "encoder: trigrams are projected");
    const int64_t input = trigram ? 3 * width : width, sum = before ? std::get<2>(*before) : width;
    require(after ? std::get<2>(*after) == encoder_.hidden : sum == encoder_.hidden,
            "encoder: embeddings of another width");
    to.words = floats(words);
    to.vocabulary = vocabulary;
    to.width = width;
    to.trigram = trigram;
    if (before) to.before = linear({*before}, input, table_precision());
    if (after) to.after = linear({*after}, sum, table_precision());
    to.positions = floats(positions);
    if (positions) encoder_.places = std::min(encoder_.places, places);
    to.segments = floats(segments);
    to.kinds = kinds;
    to.norm = norm(sum_norm, sum);
  }

  // ids, places, kinds, starts: int64; see Encoding. bias 0: none; ids 0: `hidden` is the input.
  void run(uintptr_t ids, uintptr_t places, uintptr_t kinds, uintptr_t hidden, uintptr_t starts,
           int64_t texts, int threads, uintptr_t bias, int64_t bias_length) const {
    const auto numbers = [](uintptr_t address) {
      return reinterpret_cast<const int64_t*>(address);
    };
    const Encoding call{&encoder_,
                        numbers(ids),
                        numbers(places),
                        numbers(kinds),
                        reinterpret_cast<float*>(hidden),
                        numbers(starts),
                        texts,
                        floats(bias),
                        bias_length,
                        threads};
    require(multiplies(encoder_.precision), "encoder: made for another instruction set");
    py::gil_scoped_release release;
    check(call);
    run_encoder(call);
  }

 private:
  // Embeddings are read once a token and set the scale of everything: not in 8 bits.
  Precision table_precision() const {
    return encoder_.precision == Precision::kInt8 ? Precision::kFloat : encoder_.precision;
  }

  Encoder encoder_;
};

}  // namespace

void bind_encoder(py::module_& m) {
  py::class_<PyEncoder>(m, "Encoder")
      .def(py::init<int64_t, int64_t, int64_t, std::string, bool>())
      .def("add_layer", &PyEncoder::add_layer)
      .def("set_last_norm", &PyEncoder::set_last_norm)
      .def("repeat_layer", &PyEncoder::repeat_layer)
      .def("set_embeddings", &PyEncoder::set_embeddings)
      .def("run", &PyEncoder::run);
  m.def("multiplies", [](const std::string& name) { return multiplies(precision_of(name)); });
}

}  // namespace fastffn
