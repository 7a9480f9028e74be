// Squared differences of scores: no softmax, so the difference is one sum over the columns of both
// models, and its tiles are twice as large. Included only by relation.isa.cpp.
#pragma once

#include "relation_head.h"

namespace {

template <class T>
struct ScoreMse {
  static constexpr int W = kWidth<T>, kRows = std::min(4, kWidth<T>);
  static constexpr int64_t kBlockSize = W * W + W;  // of one map, see kBlock
  const Head<T>& head;

  Vector<T>* block(int64_t j) const {
    return reinterpret_cast<Vector<T>*>(head.scratch + j * kBlockSize);
  }

  template <int V>
  inline __attribute__((always_inline)) void tile(int64_t i, int64_t lane, int64_t j,
                                                  Vector<T> (&squares)[kRows]) const {
    Vector<T> difference[kRows][V] = {};
    add_scores<T, kRows, V>(head.a + i * head.stride, lane, head.b + j * head.stride, head.width,
                            head.stride, difference);
    add_scores<T, kRows, V, true>(head.teacher_a + i * head.teacher_stride, lane,
                                  head.teacher_b + j * head.teacher_stride, head.teacher_width,
                                  head.teacher_stride, difference);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        squares[r] += difference[r][v] * difference[r][v];
        block(j + v)[lane + r] = difference[r][v];
      }
    }
  }

  void run() const {
    for (int64_t i = 0; i < head.panels; ++i) {
      Vector<T> rows[W];
      for (int64_t lane = 0; lane < W; lane += kRows) {
        Vector<T> squares[kRows] = {};
        in_tiles(0, head.panels, [&](auto V, int64_t j) { tile<V>(i, lane, j, squares); });
        std::copy_n(squares, kRows, rows + lane);
      }
      reinterpret_cast<Vector<T>*>(head.values)[i] = sums_of_rows<T>(rows);
      if (!head.da && !head.db) continue;
      const Vector<T> factors = load_vector(head.weights + i * W) * T(2);
      add_gradients(head, i, [&](int64_t j, int r) { return block(j)[r] * factors[r]; });
    }
  }
};

}  // namespace
