// KL of a relation with itself. S and T are symmetric, so the upper triangle of blocks is enough,
// with one exponential per model and pair of tokens: all rows share one shift, because
// S_ij <= max_i S_ii (Cauchy-Schwarz). The exponentials are kept until the sums are known; then
// M = G + G^T is made of them, block by block, and is mapped both ways. Included only by
// relation.isa.cpp.
#pragma once

#include "relation_head.h"

namespace {

template <class T>
struct Extremes {
  T least;
  T most;
};

// Over the tokens' squared lengths; NaN if one is NaN or infinite.
template <class T>
Extremes<T> squared_lengths(const T* panels, int64_t width, int64_t stride, int64_t tokens) {
  constexpr int W = kWidth<T>;
  Vector<T> least{}, most{}, total{};
  for (int64_t first = 0; first < tokens; first += W, panels += stride) {
    Vector<T> square{};
    for (int64_t k = 0; k < width; ++k) {
      const Vector<T> x = load_vector(panels + k * W);
      square += x * x;
    }
    for (int64_t r = tokens - first; r < W; ++r) square[r] = square[0];  // no token
    total += square;
    if (first == 0) least = most = square;
    least = square < least ? square : least;
    most = larger<T>(square, most);
  }
  Extremes<T> found{least[0], most[0]};
  for (int r = 0; r < W; ++r) {
    const T nothing = total[r] - total[r];
    found.least = std::min(found.least, least[r]) + nothing;
    found.most = std::max(found.most, most[r]) + nothing;
  }
  return found;
}

template <class T>
struct SymmetricKl {
  static constexpr int W = kWidth<T>;
  const Head<T>& head;
  const T student_shift, teacher_shift;
  T* const blocks;
  Vector<T>* const sums[3];  // per panel: of e^S, e^T and e^T (T - S)
  Vector<T>* const starts;

  SymmetricKl(const Head<T>& head, T shift, T teacher_shift)
      : head(head),
        student_shift(shift),
        teacher_shift(teacher_shift),
        blocks(head.scratch),
        sums{vectors(0), vectors(1), vectors(2)},
        starts(vectors(3)) {}

  Vector<T>* vectors(int64_t k) const {
    T* behind = head.scratch + symmetric_blocks<T>(head.panels) * kBlock<T>;
    return reinterpret_cast<Vector<T>*>(behind) + k * head.panels;
  }

  // Rows `lane` and `lane` + 1 of panel i against V panels from j on; `diagonal`: j is i.
  template <int V, bool diagonal>
  inline __attribute__((always_inline)) void tile(const ShiftedExp2<T>& student,
                                                  const ShiftedExp2<T>& teacher, int64_t i,
                                                  int64_t lane, int64_t j, T* block,
                                                  Vector<T> (&rows)[3][2]) const {
    Vector<T> s[2][V], t[2][V];
    make_scores<T, 2, V>(head, starts, i, lane, j, s, t);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Vector<T> terms[3][2];
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r) {
        terms[0][r] = student(s[r][v]);
        terms[1][r] = teacher(t[r][v]);
        terms[2][r] = terms[1][r] * (t[r][v] - s[r][v]);
#pragma GCC unroll 3
        for (int q = 0; q < 3; ++q) rows[q][r] += terms[q][r];
        Vector<T>* to = reinterpret_cast<Vector<T>*>(block + v * kBlock<T>) + lane + r;
        to[0] = terms[0][r];
        to[W] = terms[1][r];
      }
      if (!diagonal || v > 0) {  // the block on the other side of the diagonal
#pragma GCC unroll 3
        for (int q = 0; q < 3; ++q) sums[q][j + v] += terms[q][0] + terms[q][1];
      }
    }
  }

  void exponentials() const {
    const ShiftedExp2<T> to_student(student_shift), to_teacher(teacher_shift);
    fill_starts<T>(head, kNoScore, starts);
    for (int q = 0; q < 3; ++q) std::fill_n(sums[q], head.panels, Vector<T>{});
    T* block = blocks;
    for (int64_t i = 0; i < head.panels; ++i) {
      Vector<T> rows[3][W];
      for (int64_t lane = 0; lane < W; lane += 2) {
        Vector<T> pair[3][2] = {};
        const auto first = std::min<int64_t>(i + kTileVectors, head.panels);
        in_tiles(i, first, [&](auto V, int64_t j) {
          tile<V, true>(to_student, to_teacher, i, lane, j, block, pair);
        });
        in_tiles(first, head.panels, [&](auto V, int64_t j) {
          tile<V, false>(to_student, to_teacher, i, lane, j, block + (j - i) * kBlock<T>, pair);
        });
        for (int q = 0; q < 3; ++q) rows[q][lane] = pair[q][0], rows[q][lane + 1] = pair[q][1];
      }
      for (int q = 0; q < 3; ++q) sums[q][i] += sums_of_rows<T>(rows[q]);
      block += (head.panels - i) * kBlock<T>;
    }
  }

  // The values; the sums of e^S and e^T become the factors of these in M.
  void values() const {
    const Vector<T> shifts = all<T>(student_shift - teacher_shift);
    for (int64_t i = 0; i < head.panels; ++i) {
      const Vector<T> value = kl_of<T>(sums[1][i], sums[0][i], sums[2][i], shifts);
      reinterpret_cast<Vector<T>*>(head.values)[i] = value;
      const Vector<T> weight = load_vector(head.weights + i * W);
      sums[0][i] = weight / sums[0][i];
      sums[1][i] = weight / sums[1][i];
    }
  }

  // M_ij = e^S_ij (w_i / sum_i + w_j / sum_j) - the same of the teacher
  void gradient() const {
    const T* factors[2] = {reinterpret_cast<const T*>(sums[0]),
                           reinterpret_cast<const T*>(sums[1])};
    const T* block = blocks;
    for (int64_t i = 0; i < head.panels; ++i) {
      for (int64_t j = i; j < head.panels; ++j, block += kBlock<T>) {
        const Vector<T> across[2] = {sums[0][j], sums[1][j]};
        const Vector<T>* exponentials = reinterpret_cast<const Vector<T>*>(block);
        Vector<T> maps[W];
#pragma GCC unroll 4
        for (int r = 0; r < W; ++r)
          maps[r] = minus_product(exponentials[r], across[0] + factors[0][i * W + r],
                                  exponentials[W + r], across[1] + factors[1][i * W + r]);
        add_mapped<T>(maps, head.a + i * head.stride, head.width, head.da + j * head.stride);
        if (i == j) continue;
        transpose<T>(maps);
        add_mapped<T>(maps, head.a + j * head.stride, head.width, head.da + i * head.stride);
      }
    }
  }
};

// Computes a head whose tokens do not differ too much in length for one shift; false: they do.
template <class T>
bool symmetric_kl(const Head<T>& head) {
  if (!fits_symmetric<T>(head.panels)) return false;
  // Exponentials end at the shift less 125 (float) or 1000: far below a sum that is within this.
  const T spread = sizeof(T) == 4 ? 60 : 900;
  const auto student = squared_lengths(head.a, head.width, head.stride, head.tokens);
  const auto teacher =
      squared_lengths(head.teacher_a, head.teacher_width, head.teacher_stride, head.tokens);
  if (!(student.most - student.least < spread && teacher.most - teacher.least < spread))
    return false;
  const SymmetricKl<T> work(head, std::ceil(student.most), std::ceil(teacher.most));
  work.exponentials();
  work.values();
  if (head.da) work.gradient();
  return true;
}

}  // namespace
