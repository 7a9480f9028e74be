// The row kernel on CPU: program, dropout, residual and LayerNorm while a row is in L1, forward and
// backward in one pass over memory each. Compiled once per instruction set.
//
// The backward computes the program's value and the sum again instead of keeping them: it reads the
// same operands anyway, and arithmetic in L1 is cheaper than another tensor in memory.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "dispatch.h"
#include "rows.h"

namespace {

using fastffn::Dropout;
using fastffn::ResidualNorm;
using fastffn::ResidualNormBackward;
using fastffn::ResidualNormForward;

// Random bits of a row, 16 a column, as random.h says. `bits` has room for a multiple of 128.
void random_row(uint16_t* bits, int64_t columns, int64_t row, uint64_t seed) {
  constexpr int64_t kCalls = 16;
  const auto low = static_cast<uint32_t>(row), high = static_cast<uint32_t>(row >> 32);
  const auto key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int64_t at = 0; at < columns; at += kCalls * fastffn::kPhiloxColumns) {
    uint32_t words[kCalls][4];
    const auto first = static_cast<uint32_t>(at / fastffn::kPhiloxColumns);
#pragma omp simd
    for (uint32_t i = 0; i < kCalls; ++i) {
      uint32_t w[4] = {first + i, low, high, 0};
      fastffn::philox(w, key0, key1);
      words[i][0] = w[0];
      words[i][1] = w[1];
      words[i][2] = w[2];
      words[i][3] = w[3];
    }
    // On a little-endian machine the eight halves of a call lie in their order.
    std::memcpy(bits + at, words, sizeof(words));
  }
}

// One thread's row: its buffers, and what forward and backward have in common.
template <class T>
class Row {
 public:
  static int64_t memory_size(const ResidualNorm& call) {
    const int64_t row = Arena<T>::rounded(padded(call.columns));
    return 5 * row + Arena<T>::rounded(call.columns + 128) +
           Arena<T>::rounded(RowProgram<T>::memory_size(*call.program, call.columns));
  }

  Row(const ResidualNorm& call, Arena<T>& arena)
      : call_(call),
        n_(call.columns),
        sum_(arena.take(padded(n_))),
        kept_(arena.take(padded(n_))),
        residual_(arena.take(padded(n_))),
        weight_(arena.take(padded(n_))),
        bias_(arena.take(padded(n_))),
        bits_(reinterpret_cast<uint16_t*>(arena.take(n_ + 128))),
        program_(*call.program, call.inputs, call.rows, n_,
                 arena.take(RowProgram<T>::memory_size(*call.program, n_))),
        seed_(call.dropout.threshold ? *call.dropout.seed : 0) {
    fill(weight_, call.weight, T(1));
    fill(bias_, call.bias, T(0));
  }

  // The row of the sum, before the norm; `kept` then holds what dropout multiplies with.
  T* sum(int64_t row) {
    const T* residual = call_.residual.data
                            ? read_row(call_.residual, call_.rows, n_, row, 0, n_, residual_)
                            : nullptr;
    const uint32_t threshold = call_.dropout.threshold;
    if (threshold) {
      random_row(bits_, n_, call_.dropout.first_row + row, seed_);
      const T scale = static_cast<T>(call_.dropout.scale());
#pragma omp simd
      for (int64_t i = 0; i < n_; ++i) kept_[i] = bits_[i] >= threshold ? scale : T(0);
    }
    for (int64_t column = 0; column < n_; column += program_.length) {
      const int64_t n = std::min(program_.length, n_ - column);
      program_.run(row, column, n);
      const T *e = program_.result(0), *k = kept_ + column, *r = residual + column;
      T* s = sum_ + column;
      if (threshold && residual) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) s[i] = e[i] * k[i] + r[i];
      } else if (residual) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) s[i] = e[i] + r[i];
      } else if (threshold) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) s[i] = e[i] * k[i];
      } else {
        std::memcpy(s, e, n * sizeof(T));
      }
    }
    return sum_;
  }

  T* sum_buffer() { return sum_; }
  const T* kept() const { return kept_; }
  const T* weight() const { return weight_; }
  const T* bias() const { return bias_; }

 private:
  void fill(T* buffer, const Matrix& vector, T absent) {
    if (vector.data) {
      load(buffer, vector.data, vector.dtype, 0, vector.column, n_);
    } else {
      std::fill_n(buffer, n_, absent);
    }
  }

  const ResidualNorm& call_;
  const int64_t n_;
  T *sum_, *kept_, *residual_, *weight_, *bias_;
  uint16_t* bits_;
  RowProgram<T> program_;
  const uint64_t seed_;
};

template <class T>
T& element(const Matrix& vector, int64_t row) {
  return reinterpret_cast<T*>(vector.data)[row * vector.row];
}

// Runs body(first row, last row, arena) for pieces of the rows on the threads.
template <class T, class Body>
void over_rows(const ResidualNorm& call, int64_t piece, int64_t memory_size, Body body) {
  const int64_t pieces = (call.rows + piece - 1) / piece;
#pragma omp parallel if (call.rows * call.columns >= kSerialElements)
  {
    const Memory<T> memory = allocate<T>(memory_size);
    std::fill_n(memory.get(), memory_size, T(0));
    Arena<T> arena(memory.get());
    auto worker = body(arena);
#pragma omp for schedule(static)
    for (int64_t at = 0; at < pieces; ++at)
      worker(at * piece, std::min(call.rows, (at + 1) * piece));
  }
}

template <class T>
void forward(const ResidualNormForward& call) {
  constexpr int64_t kPiece = 8;
  const int64_t n = call.columns;
  over_rows<T>(call, kPiece, Row<T>::memory_size(call), [&call, n](Arena<T>& arena) {
    return [&call, n, row = Row<T>(call, arena)](int64_t first, int64_t last) mutable {
      const T* weight = row.weight();
      const T* bias = row.bias();
      const bool direct = call.y.dtype == kNative<T> && call.y.column == 1;
      for (int64_t at = first; at < last; ++at) {
        T* s = row.sum(at);
        const T mean = sum_of<T>(n, [s](int64_t i) { return s[i]; }) / n;
        const T variance =
            sum_of<T>(n, [s, mean](int64_t i) { return (s[i] - mean) * (s[i] - mean); }) / n;
        const T rstd = 1 / std::sqrt(variance + static_cast<T>(call.eps));
        T* y = direct ? reinterpret_cast<T*>(call.y.data) + at * call.y.row : s;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) y[i] = (s[i] - mean) * rstd * weight[i] + bias[i];
        if (!direct) write_row(s, call.y, at, 0, n);
        if (call.mean.data) element<T>(call.mean, at) = mean;
        if (call.rstd.data) element<T>(call.rstd, at) = rstd;
      }
    };
  });
}

template <class T>
void backward(const ResidualNormBackward& call) {
  const int64_t n = call.columns, row_size = Arena<T>::rounded(padded(n));
  const int64_t size =
      Row<T>::memory_size(call) + 3 * row_size + RowProgram<T>::memory_size(*call.gradient, n);
  over_rows<T>(call, call.chunk, size, [&call, n](Arena<T>& arena) {
    return [&call, n, row = Row<T>(call, arena), dy_buffer = arena.take(padded(n)),
            ds = arena.take(padded(n)), de = arena.take(padded(n)),
            gradient = RowProgram<T>(*call.gradient, call.inputs, call.rows, n,
                                     arena.take(RowProgram<T>::memory_size(*call.gradient, n)))](
               int64_t first, int64_t last) mutable {
      const int64_t vectors = 2 + call.summed_count;
      T* sums = reinterpret_cast<T*>(call.sums) + first / call.chunk * vectors * n;
      std::fill_n(sums, vectors * n, T(0));
      T *dweight = sums, *dbias = sums + n;
      const T* weight = row.weight();
      const T* kept = row.kept();
      for (int64_t at = first; at < last; ++at) {
        const T mean = element<T>(call.mean, at), rstd = element<T>(call.rstd, at);
        const T* dy = read_row(call.dy, call.rows, n, at, 0, n, dy_buffer);
        T* x = row.sum(at);  // normalised in place
        T level = 0, slope = 0;
#pragma omp simd reduction(+ : level, slope)
        for (int64_t i = 0; i < n; ++i) {
          x[i] = (x[i] - mean) * rstd;
          dweight[i] += dy[i] * x[i];
          dbias[i] += dy[i];
          ds[i] = dy[i] * weight[i];
          level += ds[i];
          slope += ds[i] * x[i];
        }
        level /= n;
        slope /= n;
        const T* upstream = ds;
        if (call.dropout.threshold) {
          upstream = de;
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) {
            ds[i] = rstd * (ds[i] - level - x[i] * slope);
            de[i] = ds[i] * kept[i];
          }
        } else {
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) ds[i] = rstd * (ds[i] - level - x[i] * slope);
        }
        for (int64_t column = 0; column < n; column += gradient.length) {
          const int64_t part = std::min(gradient.length, n - column);
          gradient.run(at, column, part, upstream + column);
          for (int s = 0; s < call.summed_count; ++s)
            add_to(sums + (2 + s) * n + column, gradient.result(call.summed[s]), part);
          for (int k = 0; k < call.gradient->outputs; ++k) {
            const T* result = gradient.result(k);
            if (k == call.added_to) {
              T* total = row.sum_buffer();  // its value is used up
#pragma omp simd
              for (int64_t i = 0; i < part; ++i) total[i] = result[i] + ds[column + i];
              result = total;
            }
            write_row(result, call.gradients[k], at, column, part);
          }
        }
        if (call.dresidual.data) write_row(ds, call.dresidual, at, 0, n);
      }
    };
  });
}

}  // namespace

namespace fastffn::FASTFFN_ISA {

void residual_norm(const ResidualNormForward& call) {
  call.in_double ? forward<double>(call) : forward<float>(call);
}

void residual_norm_backward(const ResidualNormBackward& call) {
  call.in_double ? backward<double>(call) : backward<float>(call);
}

}  // namespace fastffn::FASTFFN_ISA
