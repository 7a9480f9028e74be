// The relation of one head, on panels: values of its tokens, and gradients.
//
// Both forms keep a scratch of score blocks; a block is [student, teacher][kWidth rows][kWidth].
//
//   symmetric_kl  KL of a relation with itself. S and T are symmetric, so the upper triangle of
//                 blocks is enough, with one exponential per model and pair of tokens: all rows
//                 share one shift, because S_ij <= max_i S_ii (Cauchy-Schwarz). The exponentials
//                 are kept until the sums are known; then M = G + G^T is made of them, block by
//                 block, and is mapped both ways.
//   any_relation  everything else: all blocks of kWidth rows at a time, as in a softmax.
//
// Included only by relation.isa.cpp.
#pragma once

#include "panels.h"

namespace {

using fastffn::Divergence;

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

template <class T>
struct Head {
  int64_t tokens;
  int64_t panels;
  int64_t width;
  int64_t teacher_width;
  int64_t stride;  // from one panel to the next, in numbers
  int64_t teacher_stride;
  const T* a;  // panels, scaled so that products are scores, times log2(e) under a softmax
  const T* b;
  const T* teacher_a;
  const T* teacher_b;
  const T* weights;  // [panels * kWidth], 0 past the tokens
  T* values;         // [panels * kWidth], written
  // Panels with zeros, to which the gradients by a and b are added, up to a factor. Null if not
  // wanted, and one for both of a relation with itself.
  T* da;
  T* db;
  T* scratch;  // scratch_size
};

// A little more than a power of two: blocks at the same place of the cache would push each other
// out of it.
template <class T>
constexpr int64_t kBlock = 2 * kWidth<T> * kWidth<T> + kWidth<T>;

// Symmetric relations keep panels^2 / 2 blocks; above this many bytes they are computed as any.
constexpr int64_t kKeptBytes = 8 << 20;

template <class T>
int64_t symmetric_blocks(int64_t panels) {
  return panels * (panels + 1) / 2;
}

template <class T>
bool fits_symmetric(int64_t panels) {
  return symmetric_blocks<T>(panels) * kBlock<T> * static_cast<int64_t>(sizeof(T)) <= kKeptBytes;
}

// Numbers: blocks, then for each panel four vectors of sums and one of starts.
template <class T>
int64_t scratch_size(int64_t panels, bool symmetric) {
  const int64_t blocks =
      symmetric && fits_symmetric<T>(panels) ? symmetric_blocks<T>(panels) : panels;
  return blocks * kBlock<T> + 5 * panels * kWidth<T>;
}

// What scores start from: at lanes past the last token so low that no exponential is left of them.
template <class T>
void fill_starts(const Head<T>& head, T low, Vector<T>* starts) {
  for (int64_t panel = 0; panel < head.panels; ++panel) starts[panel] = Vector<T>{};
  for (int64_t i = head.tokens; i < head.panels * kWidth<T>; ++i)
    reinterpret_cast<T*>(starts)[i] = low;
}

constexpr float kNoScore = -1e30f;

// sum_j P (log P - log R) in nats, P and R the softmaxes that e^T / `sum` and e^S / `other_sum`
// are: from sum_j e^T (T - S) and what S was shifted by more than T, all to base 2.
template <class T>
Vector<T> kl_of(Vector<T> sum, Vector<T> other_sum, Vector<T> difference, Vector<T> shift) {
  const Log2<T> log(sum), other(other_sum);
  const Vector<T> whole = other.whole - log.whole + shift;
  return (difference / sum + whole + (other.rest - log.rest)) * static_cast<T>(kLn2);
}

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
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) s[0][v] = s[1][v] = t[0][v] = t[1][v] = starts[j + v];
    add_scores<T, 2, V>(head.a + i * head.stride, lane, head.a + j * head.stride, head.width,
                        head.stride, s);
    add_scores<T, 2, V>(head.teacher_a + i * head.teacher_stride, lane,
                        head.teacher_a + j * head.teacher_stride, head.teacher_width,
                        head.teacher_stride, t);
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
          maps[r] = exponentials[r] * (across[0] + factors[0][i * W + r]) -
                    exponentials[W + r] * (across[1] + factors[1][i * W + r]);
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
  const T spread = sizeof(T) == 4 ? 100 : 900;  // below this, every row's sum is a normal number
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

template <class T, Divergence divergence>
struct AnyRelation {
  static constexpr int W = kWidth<T>;
  static constexpr bool kSoftmax = divergence != Divergence::kScoreMse;
  const Head<T>& head;
  Vector<T>* const starts;

  explicit AnyRelation(const Head<T>& head)
      : head(head), starts(reinterpret_cast<Vector<T>*>(head.scratch + head.panels * kBlock<T>)) {
    fill_starts<T>(head, kSoftmax ? kNoScore : 0, starts);
  }

  Vector<T>* student(int64_t j) const {
    return reinterpret_cast<Vector<T>*>(head.scratch + j * kBlock<T>);
  }

  template <int V>
  inline __attribute__((always_inline)) void tile(int64_t i, int64_t lane, int64_t j,
                                                  Vector<T> (&most)[2][2]) const {
    Vector<T> s[2][V], t[2][V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) s[0][v] = s[1][v] = t[0][v] = t[1][v] = starts[j + v];
    add_scores<T, 2, V>(head.a + i * head.stride, lane, head.b + j * head.stride, head.width,
                        head.stride, s);
    add_scores<T, 2, V>(head.teacher_a + i * head.teacher_stride, lane,
                        head.teacher_b + j * head.teacher_stride, head.teacher_width,
                        head.teacher_stride, t);
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
    if constexpr (kSoftmax)
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
      for (int64_t j = 0; j < head.panels; ++j)
        of_row(student(j)[lane], student(j)[W + lane], totals);
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
    if constexpr (divergence == Divergence::kScoreMse) {
      sum_rows(sums, prepare, [](int64_t) {
        return [](Vector<T>& s, Vector<T>& t, Vector<T>(&totals)[3]) {
          s -= t;
          totals[0] += s * s;
        };
      });
      factors[0] = weight + weight;
      return sums[0];
    } else {
      sum_rows(sums, prepare, [&shifts](int64_t lane) {
        return
            [student = ShiftedExp2<T>(shifts[0][lane]), teacher = ShiftedExp2<T>(shifts[1][lane])](
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
              };
            });
        factors[0] = weight + weight;
        factors[1] = factors[0] * sums[1];
        return sums[0];
      }
    }
  }

  // A row of G from what `values` left in the blocks.
  static inline __attribute__((always_inline)) Vector<T> map(Vector<T> s, Vector<T> t, T factor,
                                                             T other) {
    switch (divergence) {
      case Divergence::kKl:
        return s * factor - t * other;
      case Divergence::kReverseKl:
        return s * factor * (t - other);
      case Divergence::kProbabilityMse:
        return s * (t * factor - other);
      case Divergence::kScoreMse:
        return s * factor;
    }
    __builtin_unreachable();
  }

  void gradient(int64_t i, const Vector<T> (&factors)[2]) const {
    for (int64_t j = 0; j < head.panels; ++j) {
      Vector<T> maps[W];
#pragma GCC unroll 4
      for (int r = 0; r < W; ++r)
        maps[r] = map(student(j)[r], student(j)[W + r], factors[0][r], factors[1][r]);
      if (head.db)
        add_mapped<T>(maps, head.a + i * head.stride, head.width, head.db + j * head.stride);
      if (!head.da) continue;
      transpose<T>(maps);
      add_mapped<T>(maps, head.b + j * head.stride, head.width, head.da + i * head.stride);
    }
  }

  void run() const {
    for (int64_t i = 0; i < head.panels; ++i) {
      Vector<T> factors[2] = {};
      reinterpret_cast<Vector<T>*>(head.values)[i] = values(i, factors);
      if (head.da || head.db) gradient(i, factors);
    }
  }
};

template <class T>
void any_relation(const Head<T>& head, Divergence divergence) {
  switch (divergence) {
    case Divergence::kKl:
      return AnyRelation<T, Divergence::kKl>(head).run();
    case Divergence::kReverseKl:
      return AnyRelation<T, Divergence::kReverseKl>(head).run();
    case Divergence::kProbabilityMse:
      return AnyRelation<T, Divergence::kProbabilityMse>(head).run();
    case Divergence::kScoreMse:
      return AnyRelation<T, Divergence::kScoreMse>(head).run();
  }
}

}  // namespace
