// One head of a relation on panels, and what the ways to compute it share. Each has a scratch of
// blocks: the maps between kWidth tokens and kWidth others. Included only by relation.isa.cpp.
#pragma once

#include "panels.h"

namespace {

using fastffn::Divergence;

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

// Numbers of a block of student and teacher: a little more than a power of two, since blocks at the
// same place of the cache would push each other out of it.
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

// Numbers, for heads of up to so many panels: blocks, then five vectors for each panel.
template <class T>
int64_t scratch_size(int64_t panels, bool symmetric) {
  int64_t kept = symmetric ? panels : 0;
  while (!fits_symmetric<T>(kept)) --kept;
  const int64_t blocks = std::max(panels, symmetric_blocks<T>(kept));
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

// Scores of R rows of panel i from `lane` on against V panels from j on, of both models.
template <class T, int R, int V>
inline __attribute__((always_inline)) void make_scores(const Head<T>& head, const Vector<T>* starts,
                                                       int64_t i, int64_t lane, int64_t j,
                                                       Vector<T> (&s)[R][V], Vector<T> (&t)[R][V]) {
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) s[r][v] = t[r][v] = starts[j + v];
  add_scores<T, R, V>(head.a + i * head.stride, lane, head.b + j * head.stride, head.width,
                      head.stride, s);
  add_scores<T, R, V>(head.teacher_a + i * head.teacher_stride, lane,
                      head.teacher_b + j * head.teacher_stride, head.teacher_width,
                      head.teacher_stride, t);
}

// Adds the gradients that the rows of panel i bring: row(j, r) is row r of G between panels i and
// j.
template <class T, class Row>
inline void add_gradients(const Head<T>& head, int64_t i, Row row) {
  constexpr int W = kWidth<T>;
  for (int64_t j = 0; j < head.panels; ++j) {
    Vector<T> maps[W];
#pragma GCC unroll 4
    for (int r = 0; r < W; ++r) maps[r] = row(j, r);
    if (head.db)
      add_mapped<T>(maps, head.a + i * head.stride, head.width, head.db + j * head.stride);
    if (!head.da) continue;
    transpose<T>(maps);
    add_mapped<T>(maps, head.b + j * head.stride, head.width, head.da + i * head.stride);
  }
}

}  // namespace
