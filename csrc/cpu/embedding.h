// Embeddings of an encoder's tokens, see ../encoder.h. Included only by *.isa.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../encoder.h"
#include "gemm.h"
#include "rows.h"

namespace {

using fastffn::Embeddings;
using fastffn::Encoding;
using fastffn::Norm;
using fastffn::whole_panels;

// y = LayerNorm(s) of one row of n numbers; y may be s.
inline void layer_norm(const float* s, int64_t n, const Norm& norm, float* y) {
  const float *weight = norm.weight.data(), *bias = norm.bias.data();
  const float mean = sum_of<float>(n, [s](int64_t i) { return s[i]; }) / n;
  const float variance =
      sum_of<float>(n, [s, mean](int64_t i) { return (s[i] - mean) * (s[i] - mean); }) / n;
  const float rstd = 1 / std::sqrt(variance + norm.eps);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = (s[i] - mean) * rstd * weight[i] + bias[i];
}

// The position of a token of the text that begins at row `begin`.
inline int64_t place(const Encoding& call, int64_t row, int64_t begin) {
  return call.places ? call.places[row] : row - begin;
}

// Runs body(row, first row of its text, end of its text) for tokens [first, last).
template <class Body>
void over_tokens(const Encoding& call, int64_t first, int64_t last, Body body) {
  const int64_t* starts = call.starts;
  int64_t text = std::upper_bound(starts, starts + call.texts + 1, first) - starts - 1;
  for (int64_t row = first; row < last; ++row) {
    while (starts[text + 1] <= row) ++text;
    body(row, starts[text], starts[text + 1]);
  }
}

// One thread's buffers for blocks of up to `rows` tokens.
class Embedder {
 public:
  Embedder(const Encoding& call, int64_t rows)
      : call_(call),
        table_(call.encoder->embeddings),
        // Where tokens are not given nothing is needed, and the width is not known either.
        rows_(call.ids ? rows : 0),
        sums_(allocate<float>(rows_ * columns() + kLanes)),
        words_(allocate<float>(rows_ * table_.before.k + kLanes)),
        projected_(allocate<float>(rows_ * table_.after.columns() + kLanes)),
        product_(rows_, std::max(table_.before.k, table_.after.k),
                 table_.before.panels ? table_.before.precision : table_.after.precision) {}

  // Writes the rows [first, last) of the hidden states.
  void run(int64_t first, int64_t last) {
    const int64_t rows = last - first, n = table_.sum_width(), hidden = call_.encoder->hidden;
    if (table_.before.panels) {
      const int64_t k = table_.before.k;
      over_tokens(call_, first, last, [&](int64_t row, int64_t begin, int64_t end) {
        gather(words_.get() + (row - first) * k, row, begin, end);
      });
      product_(words_.get(), k, table_.before, sums_.get(), columns(), rows);
    }
    over_tokens(call_, first, last, [&](int64_t row, int64_t begin, int64_t) {
      float* s = sums_.get() + (row - first) * columns();
      if (!table_.before.panels) std::memcpy(s, word(row), n * sizeof(float));
      if (table_.positions) add_to(s, table_.positions + place(call_, row, begin) * n, n);
      if (table_.segments) add_to(s, table_.segments + (call_.kinds ? call_.kinds[row] : 0) * n, n);
      layer_norm(s, n, table_.norm, table_.after.panels ? s : call_.hidden + row * hidden);
    });
    if (!table_.after.panels) return;
    const int64_t width = table_.after.columns();
    product_(sums_.get(), columns(), table_.after, projected_.get(), width, rows);
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(call_.hidden + (first + r) * hidden, projected_.get() + r * width,
                  hidden * sizeof(float));
  }

 private:
  int64_t columns() const { return whole_panels(table_.sum_width()); }

  const float* word(int64_t row) const { return table_.words + call_.ids[row] * table_.width; }

  // A token's word vector, or those of the token before, of it and of the one after.
  void gather(float* to, int64_t row, int64_t begin, int64_t end) const {
    const int64_t width = table_.width, reach = table_.trigram ? 1 : 0;
    for (int64_t at = row - reach; at <= row + reach; ++at, to += width) {
      // A neighbour is next to it, with no padding between.
      if (at < begin || at >= end || place(call_, at, begin) - place(call_, row, begin) != at - row)
        std::fill_n(to, width, 0.0f);
      else
        std::memcpy(to, word(at), width * sizeof(float));
    }
  }

  const Encoding& call_;
  const Embeddings& table_;
  const int64_t rows_;
  const Memory<float> sums_, words_, projected_;
  Product product_;
};

}  // namespace
