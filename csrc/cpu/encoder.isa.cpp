// An encoder's layers over the rows of all texts, without padding; compiled once per instruction
// set.
//
// Rows need each other in attention only. So where the texts can be dealt out evenly, each thread
// takes some texts through all layers by itself: nobody waits for anybody, and a text's activations
// stay in the thread's cache. Where they cannot (one text, two threads) all threads go through the
// layers together, each with a share of the rows, and wait once a layer, when keys and values are
// there.
//
// After attention a row goes to the end of its layer in blocks of kBlockRows rows: products,
// programs and norms of a block find each other's results in L2, weights stream by from L3.

#include "../encoder.h"

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "attention.h"
#include "dispatch.h"
#include "embedding.h"
#include "gemm.h"
#include "rows.h"

namespace {

using fastffn::Encoder;
using fastffn::Encoding;
using fastffn::Layer;
using fastffn::Norm;
using fastffn::Segment;
using fastffn::Source;
using fastffn::Unit;
using fastffn::whole_panels;

constexpr int64_t kBlockRows = 96;      // eight tiles of twelve
constexpr int64_t kFewRows = 32;        // below, weights are read too often for the work
constexpr int64_t kWindowQueries = 96;  // that share their keys, where each sees a window
constexpr double kEvenly = 1.15;        // of texts dealt out: the longest share over the mean

// Texts that one thread takes through the layers together.
struct Group {
  int64_t first, last;  // texts
};

// One thread's buffers, and the parts of a layer over a range of rows.
class Worker {
 public:
  // most: rows of keys and values at a time; 0 if they are everybody's. rows: that it attends to.
  Worker(const Encoding& call, int64_t most, int64_t rows)
      : call_(call),
        encoder_(*call.encoder),
        hidden_(encoder_.hidden),
        columns_(whole_panels(hidden_)),
        widest_(encoder_.widest()),
        longest_(0),
        own_qkv(allocate<float>(most * 3 * columns_ + kLanes)),
        context_(allocate<float>(rows * columns_ + kLanes)),
        first_(allocate<float>(kBlockRows * widest_ + kLanes)),
        second_(allocate<float>(kBlockRows * columns_ + kLanes)),
        prologue_(allocate<float>(kBlockRows * columns_ + kLanes)),
        normal_(allocate<float>(encoder_.pre_norm ? kBlockRows * columns_ + kLanes : 0)),
        row_(allocate<float>(columns_ + kLanes)),
        product_(kBlockRows, std::max(columns_, widest_), encoder_.precision),
        embedder_(call, kBlockRows) {
    for (int64_t text = 0; text < call.texts; ++text)
      longest_ = std::max(longest_, call.starts[text + 1] - call.starts[text]);
    int64_t window = -1;
    for (const auto& layer : encoder_.layers) window = std::max(window, layer->window);
    window_.reserve(window >= 0 ? kWindowQueries * (kWindowQueries + 2 * window) : 0);
    attention_ = allocate<float>(attend_workspace(longest_, encoder_.head_size));
    int64_t registers = 0;
    for (const auto& layer : encoder_.layers)
      for (const Unit& unit : layer->units)
        for (const Segment* segment : {&unit.prologue, &unit.middle, &unit.epilogue})
          if (segment->program)
            registers = std::max(registers, RowProgram<float>::memory_size(
                                                segment->program->code(),
                                                segment == &unit.middle ? unit.width : hidden_));
    registers_ = allocate<float>(registers + kLanes);
    std::fill_n(registers_.get(), registers + kLanes, 0.0f);
  }

  // The rows' embeddings, if the call gives tokens.
  void embed(int64_t first, int64_t last) {
    if (!call_.ids) return;
    for (int64_t at = first; at < last; at += kBlockRows)
      embedder_.run(at, std::min(at + kBlockRows, last));
  }

  // `qkv`: where row 0 of the call would be; its rows are 3 * columns wide.
  void project(const Layer& layer, float* qkv, int64_t first, int64_t last) {
    for (int64_t at = first; at < last; at += kBlockRows) {
      const int64_t rows = std::min(kBlockRows, last - at);
      const Rows x = before(layer.norm, call_.hidden + at * hidden_, rows);
      product_(x.data, x.row, layer.qkv, qkv + at * 3 * columns_, 3 * columns_, rows);
    }
    if (layer.cosines) rotate(layer, qkv, first, last);
  }

  // Rows [first, last) to the end of the layer; `qkv` holds all rows of their texts.
  void finish(const Layer& layer, const float* qkv, int64_t first, int64_t last) {
    mix(layer, qkv, first, last);
    for (int64_t at = first; at < last; at += kBlockRows) {
      const int64_t rows = std::min(kBlockRows, last - at);
      float* h = call_.hidden + at * hidden_;
      product_(context_.get() + (at - first) * columns_, columns_, layer.output, second_.get(),
               columns_, rows);
      add(nullptr, layer.norm, h, rows);
      for (const Unit& unit : layer.units) feed_forward(unit, h, rows);
    }
  }

  // What comes behind the last layer.
  void close(int64_t first, int64_t last) {
    if (encoder_.last.weight.empty()) return;
    for (int64_t at = first; at < last; ++at) {
      float* h = call_.hidden + at * hidden_;
      layer_norm(h, hidden_, encoder_.last, h);
    }
  }

 private:
  struct Rows {
    const float* data;
    int64_t row;
  };

  // What a part of the layer takes: the hidden states, normalised first if norms stand before.
  Rows before(const Norm& norm, const float* h, int64_t rows) {
    if (!encoder_.pre_norm || norm.weight.empty()) return {h, hidden_};
    for (int64_t r = 0; r < rows; ++r)
      layer_norm(h + r * hidden_, hidden_, norm, normal_.get() + r * columns_);
    return {normal_.get(), columns_};
  }

  // (a, b) -> (a cos - b sin, b cos + a sin), a and b the halves of a head of query and key.
  void rotate(const Layer& layer, float* qkv, int64_t first, int64_t last) {
    const int64_t size = encoder_.head_size, half = size / 2;
    over_tokens(call_, first, last, [&](int64_t row, int64_t begin, int64_t) {
      const int64_t at = place(call_, row, begin) * half;
      const float *cosine = layer.cosines + at, *sine = layer.sines + at;
      for (int part = 0; part < 2; ++part)
        for (int64_t head = 0; head < encoder_.heads; ++head) {
          float* a = qkv + row * 3 * columns_ + part * columns_ + head * size;
          float* b = a + half;
#pragma omp simd
          for (int64_t i = 0; i < half; ++i) {
            const float x = a[i], y = b[i];
            a[i] = x * cosine[i] - y * sine[i];
            b[i] = y * cosine[i] + x * sine[i];
          }
        }
    });
  }

  // Attention of queries [from, to) of the text [begin, end) to all that they see.
  void mix_text(const Layer& layer, const float* qkv, int64_t begin, int64_t end, int64_t from,
                int64_t to, float* context) {
    const int64_t row = 3 * columns_, size = encoder_.head_size;
    const bool windowed = layer.window >= 0 && end - begin > layer.window + 1;
    const int64_t step = windowed ? kWindowQueries : to - from;
    for (int64_t q = from; q < to; q += step) {
      const int64_t queries = std::min(step, to - q);
      const int64_t low = windowed ? std::max(begin, q - layer.window) : begin;
      const int64_t high = windowed ? std::min(end, q + queries + layer.window) : end;
      if (windowed) see(layer.window, q, queries, low, high);
      for (int64_t head = 0; head < encoder_.heads; ++head) {
        const float* keys = qkv + low * row + columns_ + head * size;
        const float* bias = windowed ? window_.data() : nullptr;
        int64_t bias_row = high - low;
        if (call_.bias) {
          bias = call_.bias + (head * call_.bias_length + q - begin) * call_.bias_length;
          bias_row = call_.bias_length;
        }
        attend(qkv + q * row + head * size, row, keys, row, keys + columns_, row, bias, bias_row,
               context + (q - from) * columns_ + head * size, columns_, queries, high - low, size,
               layer.scale, attention_.get());
      }
    }
  }

  // The scores' bias: none within the window, and nothing is seen beyond.
  void see(int64_t window, int64_t first, int64_t queries, int64_t low, int64_t high) {
    window_.assign(queries * (high - low), -std::numeric_limits<float>::infinity());
    for (int64_t q = first; q < first + queries; ++q) {
      float* row = window_.data() + (q - first) * (high - low);
      const int64_t from = std::max(low, q - window), to = std::min(high, q + window + 1);
      std::fill(row + (from - low), row + (to - low), 0.0f);
    }
  }

  void mix(const Layer& layer, const float* qkv, int64_t first, int64_t last) {
    const int64_t* starts = call_.starts;
    int64_t text = std::upper_bound(starts, starts + call_.texts + 1, first) - starts - 1;
    for (; text < call_.texts && starts[text] < last; ++text) {
      const int64_t from = std::max(first, starts[text]), to = std::min(last, starts[text + 1]);
      if (from < to)
        mix_text(layer, qkv, starts[text], starts[text + 1], from, to,
                 context_.get() + (from - first) * columns_);
    }
  }

  void feed_forward(const Unit& unit, float* h, int64_t rows) {
    Rows x = input_ = before(unit.norm, h, rows);
    if (unit.prologue.program) {
      run(unit.prologue, hidden_, rows, prologue_.get(), columns_);
      x = {prologue_.get(), columns_};
    }
    product_(x.data, x.row, unit.first, first_.get(), widest_, rows);
    if (unit.middle.program) run(unit.middle, unit.width, rows, first_.get(), widest_, &unit);
    product_(first_.get(), widest_, unit.second, second_.get(), columns_, rows);
    add(&unit.epilogue, unit.norm, h, rows);
  }

  Matrix source(Source which, const Unit* unit) const {
    const auto dense = [](const float* data, int64_t row) {
      return Matrix{reinterpret_cast<char*>(const_cast<float*>(data)), DType::kFloat32, row, 1};
    };
    switch (which) {
      case Source::kFirst:
        return dense(first_.get(), widest_);
      case Source::kGate:
        return dense(first_.get() + unit->first.starts[1], widest_);
      case Source::kSecond:
        return dense(second_.get(), columns_);
      case Source::kInput:
        break;
    }
    return dense(input_.data, input_.row);
  }

  // Runs the Program over `columns` columns of each row; `out` may be a source, as it is read
  // first.
  void run(const Segment& segment, int64_t columns, int64_t rows, float* out, int64_t out_row,
           const Unit* unit = nullptr) {
    Matrix inputs[fastffn::kMaxOperands];
    for (size_t k = 0; k < segment.sources.size(); ++k)
      inputs[k] = source(segment.sources[k], unit);
    RowProgram<float> program(segment.program->code(), inputs, rows, columns, registers_.get());
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t column = 0; column < columns; column += program.length) {
        const int64_t n = std::min(program.length, columns - column);
        program.run(r, column, n);
        std::memcpy(out + r * out_row + column, program.result(0), n * sizeof(float));
      }
  }

  // h = LayerNorm(h + epilogue(second, x)), row by row; without the norm if it stood before.
  void add(const Segment* epilogue, const Norm& norm, float* h, int64_t rows) {
    const float* value = second_.get();
    if (epilogue && epilogue->program) run(*epilogue, hidden_, rows, second_.get(), columns_);
    const int64_t n = hidden_;
    float* s = row_.get();
    for (int64_t r = 0; r < rows; ++r, value += columns_, h += n) {
      if (encoder_.pre_norm) {
        add_to(h, value, n);
        continue;
      }
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) s[i] = h[i] + value[i];
      layer_norm(s, n, norm, h);
    }
  }

  const Encoding& call_;
  const Encoder& encoder_;
  const int64_t hidden_, columns_, widest_;
  int64_t longest_;

 public:
  const Memory<float> own_qkv;

 private:
  const Memory<float> context_, first_, second_, prologue_, normal_, row_;
  Rows input_{};               // of the unit at work
  std::vector<float> window_;  // the bias of a window
  Memory<float> attention_, registers_;
  Product product_;
  Embedder embedder_;
};

// Texts in groups of about `rows` rows.
std::vector<Group> groups_of(const Encoding& call, int64_t rows) {
  std::vector<Group> groups;
  for (int64_t text = 0; text < call.texts;) {
    const int64_t first = text;
    while (text < call.texts && call.starts[text] - call.starts[first] < rows) ++text;
    groups.push_back({first, text});
  }
  return groups;
}

int64_t rows_of(const Encoding& call, const Group& group) {
  return call.starts[group.last] - call.starts[group.first];
}

// Whether the groups keep all threads busy, each next group going to who is free first.
bool even(const Encoding& call, const std::vector<Group>& groups, int threads, int64_t tokens) {
  std::vector<int64_t> load(threads);
  for (const Group& group : groups)
    *std::min_element(load.begin(), load.end()) += rows_of(call, group);
  return *std::max_element(load.begin(), load.end()) * threads <= tokens * kEvenly;
}

using Workers = std::vector<std::unique_ptr<Worker>>;

void by_texts(const Encoding& call, const std::vector<Group>& groups, int threads) {
  int64_t most = 0;
  for (const Group& group : groups) most = std::max(most, rows_of(call, group));
  const Encoder& encoder = *call.encoder;
  const int64_t row = 3 * whole_panels(encoder.hidden);
  Workers workers;  // made here: memory may run out, and no exception may leave a thread
  for (int t = 0; t < threads; ++t) workers.push_back(std::make_unique<Worker>(call, most, most));
#pragma omp parallel num_threads(threads)
  {
    Worker& worker = *workers[omp_get_thread_num()];
#pragma omp for schedule(dynamic, 1)
    for (size_t g = 0; g < groups.size(); ++g) {
      const int64_t first = call.starts[groups[g].first], last = call.starts[groups[g].last];
      float* qkv = worker.own_qkv.get() - first * row;
      worker.embed(first, last);
      for (const int index : encoder.order) {
        const Layer& layer = *encoder.layers[index];
        worker.project(layer, qkv, first, last);
        worker.finish(layer, qkv, first, last);
      }
      worker.close(first, last);
    }
  }
}

void by_rows(const Encoding& call, int shares, int64_t tokens) {
  const Encoder& encoder = *call.encoder;
  const int64_t size = tokens * 3 * whole_panels(encoder.hidden);
  // Two, by turns: a thread may be in the next layer while another still reads this one's keys.
  const Memory<float> buffers[2] = {allocate<float>(size + kLanes), allocate<float>(size + kLanes)};
  const auto begin = [tokens, shares](int share) { return tokens * share / shares; };
  Workers workers;
  for (int share = 0; share < shares; ++share)
    workers.push_back(std::make_unique<Worker>(call, 0, begin(share + 1) - begin(share)));
#pragma omp parallel num_threads(shares)
  {
    const int me = omp_get_thread_num(), count = omp_get_num_threads();  // maybe fewer than asked
    for (int s = me; s < shares; s += count) workers[s]->embed(begin(s), begin(s + 1));
    int turn = 0;
    for (const int index : encoder.order) {
      const Layer& layer = *encoder.layers[index];
      float* qkv = buffers[turn ^= 1].get();
      for (int s = me; s < shares; s += count)
        workers[s]->project(layer, qkv, begin(s), begin(s + 1));
#pragma omp barrier
      for (int s = me; s < shares; s += count)
        workers[s]->finish(layer, qkv, begin(s), begin(s + 1));
    }
    for (int s = me; s < shares; s += count) workers[s]->close(begin(s), begin(s + 1));
  }
}

}  // namespace

namespace fastffn::FASTFFN_ISA {

void encode(const Encoding& call) {
  const int64_t tokens = call.starts[call.texts];
  if (!tokens) return;
  const int threads =
      static_cast<int>(std::clamp<int64_t>(call.threads, 1, (tokens + kTileRows - 1) / kTileRows));
  const int64_t share = tokens / (4 * threads);
  const auto groups = groups_of(call, std::clamp(share, kFewRows, 2 * kBlockRows));
  if (even(call, groups, threads, tokens))
    by_texts(call, groups, threads);
  else
    by_rows(call, threads, tokens);
}

}  // namespace fastffn::FASTFFN_ISA
