// The divergences of softmaxes, for any two operands: all blocks of kWidth rows at a time. Included
// only by relation.isa.cpp.
#pragma once

#include "relation_head.h"

namespace {

template <class T, Divergence divergence>
struct SoftmaxRelation {
  static constexpr int W = kWidth<T>;
  static constexpr int64_t kChunk = 32;  // panels
  const Head<T>& head;
  Vector<T>* const starts;

  explicit SoftmaxRelation(const Head<T>& head)
      : head(head), starts(reinterpret_cast<Vector<T>*>(head.scratch + head.panels * kBlock<T>)) {
    fill_starts<T>(head, kNoScore, starts);
  }

  Vector<T>* student(int64_t j) const {
    return reinterpret_cast<Vector<T>*>(head.scratch + j * kBlock<T>);
  }

  template <int V>
  inline __attribute__((always_inline)) void tile(int64_t i, int64_t lane, int64_t j,
                                                  Vector<T> (&most)[2][2]) const {
    Vector<T> s[2][V], t[2][V];
    make_scores<T, 2, V>(head, starts, i, lane, j, s, t);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r) {
        most[0][r] = larger<T>(s[r][v], most[0][r]);
        most[1][r] = larger<T>(t[r][v], most[1][r]);
        student(j + v)[lane + r] = s[r][v];
        student(j + v)[W + lane + r] = t[r][v];
      }
    }
  }

  // Scores of two rows of panel i, and the least whole numbers above them.
  void scores(int64_t i, int64_t lane, T (&shifts)[2][W]) const {
    Vector<T> most[2][2];
    most[0][0] = most[0][1] = most[1][0] = most[1][1] = all<T>(kNoScore);
    in_tiles(0, head.panels, [&](auto V, int64_t j) { tile<V>(i, lane, j, most); });
    for (int model = 0; model < 2; ++model)
      for (int r = 0; r < 2; ++r) shifts[model][lane + r] = std::ceil(largest<T>(most[model][r]));
  }

  // Sums of each row over all blocks: term(lane) gives a function of a row's student and teacher
  // vectors, which it replaces, and the totals. `prepare` makes two rows ready, which then are
  // still in the nearest cache.
  template <class Prepare, class Term>
  void sum_rows(Vector<T> (&sums)[3], Prepare prepare, Term term) const {
    Vector<T> rows[3][W];
    for (int64_t lane = 0; lane < W; ++lane) {
      if (lane % 2 == 0) prepare(lane);
      auto of_row = term(lane);
      Vector<T> totals[3] = {};
      for (int64_t first = 0; first < head.panels; first += kChunk) {  // rounding: sums of sums
        Vector<T> part[3] = {};
        for (int64_t j = first; j < std::min(first + kChunk, head.panels); ++j)
          of_row(student(j)[lane], student(j)[W + lane], part);
        for (int q = 0; q < 3; ++q) totals[q] += part[q];
      }
      for (int q = 0; q < 3; ++q) rows[q][lane] = totals[q];
    }
    for (int q = 0; q < 3; ++q) sums[q] = sums_of_rows<T>(rows[q]);
  }

  // Fills the blocks of panel i with what the gradient is made of, and returns the values. factors:
  // see `map`.
  Vector<T> values(int64_t i, Vector<T> (&factors)[2]) const {
    const Vector<T> weight = load_vector(head.weights + i * W);
    Vector<T> sums[3];
    T shifts[2][W];
    const auto prepare = [&](int64_t lane) { scores(i, lane, shifts); };
    sum_rows(sums, prepare, [&shifts](int64_t lane) {
      return [student = ShiftedExp2<T>(shifts[0][lane]), teacher = ShiftedExp2<T>(shifts[1][lane])](
                 Vector<T>& s, Vector<T>& t, Vector<T>(&totals)[3]) {
        const Vector<T> es = student(s), et = teacher(t), difference = t - s;
        totals[0] += es;
        totals[1] += et;
        if constexpr (divergence == Divergence::kReverseKl) totals[2] -= es * difference;
        if constexpr (divergence == Divergence::kKl) totals[2] += et * difference;
        s = es;
        t = divergence == Divergence::kReverseKl ? -difference : et;
      };
    });
    const Vector<T> shift_difference = load_vector(shifts[0]) - load_vector(shifts[1]);
    if constexpr (divergence == Divergence::kKl) {
      factors[0] = weight / sums[0];
      factors[1] = weight / sums[1];
      return kl_of<T>(sums[1], sums[0], sums[2], shift_difference);
    } else if constexpr (divergence == Divergence::kReverseKl) {
      factors[0] = weight * static_cast<T>(kLn2) / sums[0];
      factors[1] = sums[2] / sums[0];
      return kl_of<T>(sums[0], sums[1], sums[2], -shift_difference);
    } else {
      const Vector<T> inverse[2] = {all<T>(1) / sums[0], all<T>(1) / sums[1]};
      sum_rows(
          sums, [](int64_t) {},
          [&inverse](int64_t lane) {
            return [s_inverse = inverse[0][lane], t_inverse = inverse[1][lane]](
                       Vector<T>& s, Vector<T>& t, Vector<T>(&totals)[3]) {
              s *= s_inverse;
              t = s - t * t_inverse;
              totals[0] += t * t;
              totals[1] += s * t;
              totals[2] += s;  // 1, but for rounding
            };
          });
      factors[0] = weight + weight;
      factors[1] = factors[0] * sums[1] / sums[2];
      return sums[0];
    }
  }

  // A row of G from what `values` left in the blocks.
  static inline __attribute__((always_inline)) Vector<T> map(Vector<T> s, Vector<T> t, T factor,
                                                             T other) {
    switch (divergence) {
      case Divergence::kKl:
        return minus_product(s, factor, t, other);
      case Divergence::kReverseKl:
        return s * factor * (t - other);
      case Divergence::kProbabilityMse:
        return s * (t * factor - other);
      case Divergence::kScoreMse:
        break;
    }
    __builtin_unreachable();
  }

  void run() const {
    for (int64_t i = 0; i < head.panels; ++i) {
      Vector<T> factors[2] = {};
      reinterpret_cast<Vector<T>*>(head.values)[i] = values(i, factors);
      if (!head.da && !head.db) continue;
      add_gradients(head, i, [&](int64_t j, int r) {
        return map(student(j)[r], student(j)[W + r], factors[0][r], factors[1][r]);
      });
    }
  }
};

}  // namespace
