// Attention of one head of one sequence, by one thread: out = softmax(scale Q K^T + bias) V.
//
// pack_head lays keys and values out once; attend_packed computes any of the queries against them,
// so that threads can share a head's queries; attend is both. Only what belongs to the head is
// read or written, whatever lies before and behind it. Computed in float; bfloat16 is rounded on
// the way out. Included only by *.isa.cpp.
//
// Queries go through in blocks of up to kBlockQueries, keys in stretches whose scores stay in L1.
// The sums of a row follow its largest score so far, so any length takes the same memory but for
// the packed head.
//
// Why keys are transposed and not queries: a vector then holds scores of one query, and what is
// wasted on lengths that are no multiple of a vector is wasted in one of the two products only.
#pragma once

#include "arena.h"
#include "attention_tiles.h"

namespace {

// Keys [panels][head][kKeyPanel], values [keys][columns]. Lanes past the last key hold zeros.
struct PackedHead {
  const float* keys;
  const float* values;
  int64_t count;
  int64_t head;

  static int64_t columns(int64_t head) {
    return (head + kLanesOfScores - 1) / kLanesOfScores * kLanesOfScores;
  }
  static int64_t key_numbers(int64_t count, int64_t head) {
    return (count + kKeyPanel - 1) / kKeyPanel * kKeyPanel * head;
  }
  static int64_t value_numbers(int64_t count, int64_t head) { return count * columns(head); }
};

// Floats that pack_head writes.
inline int64_t packed_head_size(int64_t keys, int64_t head) {
  using A = Arena<float>;
  return A::rounded(PackedHead::key_numbers(keys, head)) +
         A::rounded(PackedHead::value_numbers(keys, head));
}

// Floats that attend_packed works in: queries, results, and the scores of a stretch.
inline int64_t attend_packed_workspace() {
  using A = Arena<float>;
  return 2 * A::rounded(kBlockQueries * kHeadRow) + A::rounded(kBlockQueries * kStretch);
}

// Floats that attend works in.
inline int64_t attend_workspace(int64_t keys, int64_t head) {
  return packed_head_size(keys, head) + attend_packed_workspace();
}

// Numbers of a row, times `factor`, any NaN as the usual one (see ShiftedExp2). The last vector
// is moved back until it lies inside the row.
template <class In>
inline __attribute__((always_inline)) void read_head(const In* from, int64_t head, float factor,
                                                     float* to) {
  constexpr int W = kLanesOfScores;
  if (head < W) {
    for (int64_t k = 0; k < head; ++k) {
      const float x = widen(from[k]) * factor;
      to[k] = x == x ? x : __builtin_nanf("");
    }
    return;
  }
  for (int64_t k = 0;; k += W) {
    if (k > head - W) k = head - W;
    const Lanes x = scaled<float>(widened<float>(from + k), factor);
    std::memcpy(to + k, &x, sizeof(x));
    if (k == head - W) return;
  }
}

template <class In>
inline __attribute__((always_inline)) void write_head(const float* from, int64_t head, float factor,
                                                      In* to) {
  constexpr int W = kLanesOfScores;
  if (head < W) {
    for (int64_t k = 0; k < head; ++k) to[k] = narrow<In>(from[k] * factor);
    return;
  }
  for (int64_t k = 0;; k += W) {
    if (k > head - W) k = head - W;
    const Lanes x = load_vector(from + k) * factor;
    In values[W];
#pragma omp simd
    for (int i = 0; i < W; ++i) values[i] = narrow<In>(x[i]);
    std::memcpy(to + k, values, sizeof(values));
    if (k == head - W) return;
  }
}

template <class In>
void pack_keys(const In* k, int64_t k_row, int64_t count, int64_t head, float* to) {
  constexpr int W = kLanesOfScores;
  for (int64_t first = 0; first < count; first += W) {
    const int64_t keys = std::min<int64_t>(W, count - first);
    const In* from = k + first * k_row;
    float* panel = to + first / kKeyPanel * kKeyPanel * head + first % kKeyPanel;
    if (head < W) {
      for (int64_t c = 0; c < head; ++c) {
        Lanes column{};
        for (int64_t r = 0; r < keys; ++r) column[r] = widen(from[r * k_row + c]);
        *reinterpret_cast<Lanes*>(panel + c * kKeyPanel) = scaled<float>(column, 1.0f);
      }
      continue;
    }
    for (int64_t c = 0;; c += W) {
      if (c > head - W) c = head - W;
      Lanes square[W];
      if (keys == W) {
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r) square[r] = widened<float>(from + r * k_row + c);
      } else {
        for (int64_t r = 0; r < W; ++r)
          square[r] = r < keys ? widened<float>(from + r * k_row + c) : Lanes{};
      }
      transpose<float>(square);
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j)
        *reinterpret_cast<Lanes*>(panel + (c + j) * kKeyPanel) = scaled<float>(square[j], 1.0f);
      if (c == head - W) break;
    }
  }
}

// Lays a head of `keys` tokens out in `packed` (packed_head_size floats, aligned to vectors).
template <class In>
PackedHead pack_head(const In* k, int64_t k_row, const In* v, int64_t v_row, int64_t keys,
                     int64_t head, float* packed) {
  Arena<float> arena(packed);
  float* const panels = arena.take(PackedHead::key_numbers(keys, head));
  float* const values = arena.take(PackedHead::value_numbers(keys, head));
  pack_keys(k, k_row, keys, head, panels);
  const int64_t columns = PackedHead::columns(head);
  for (int64_t j = 0; j < keys; ++j) {
    float* row = values + j * columns;
    *reinterpret_cast<Lanes*>(row + columns - kLanesOfScores) = Lanes{};
    read_head(v + j * v_row, head, 1.0f, row);
  }
  return {panels, values, keys, head};
}

// The rows of a bias that belong to a block's queries, from the first key on.
struct BiasRows {
  const float* data;  // null: none
  int64_t row;
  int64_t queries;
};

// What the scores of keys [first, first + keys) start from: the bias, and behind the last key -inf,
// so that nothing is left of it.
template <int R>
inline void start_scores(const BiasRows& bias, int64_t first, int64_t keys, float* scores) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (int64_t j = 0; j < keys; j += kKeyPanel, scores += R * kKeyPanel) {
    const int64_t here = std::min<int64_t>(kKeyPanel, keys - j);
    for (int r = 0; r < R; ++r) {
      float* row = scores + r * kKeyPanel;
      if (bias.data && r < bias.queries) {
        const float* from = bias.data + r * bias.row + first + j;
        for (int64_t i = 0; i < here; ++i) {
          row[i] = from[i] == from[i] ? from[i] : __builtin_nanf("");
        }
      } else {
        for (int64_t i = 0; i < here; ++i) row[i] = 0;
      }
      for (int64_t i = here; i < kKeyPanel; ++i) row[i] = -kInfinity;
    }
  }
}

// Scores are sign(scale) q k, and powers of 2 of `after` times that: their exponents. Under a bias,
// which is added between, the scale comes before.
struct Scale {
  Scale(float scale, bool biased)
      : of_query(biased || scale > 0 ? 1.0f
                 : scale < 0         ? -1.0f
                                     : 0.0f),
        before(biased ? scale : 1.0f),
        after(static_cast<float>(kLog2E * (biased || scale == 0 ? 1.0f
                                           : scale < 0          ? -scale
                                                                : scale))) {}

  float of_query;
  float before;
  float after;
};

// R queries against all keys; results are to be divided by sums, NaN where a
// row had no score above -inf.
template <int R>
void attend_block(const PackedHead& packed, const BiasRows& bias, const Scale& scale,
                  const float* queries, float* scores, float* results, float* sums) {
  constexpr int V = kKeyPanel / kLanesOfScores;
  const int64_t head = packed.head, columns = PackedHead::columns(head);
  const ScaledExp2 power(scale.after);
  float peaks[R], factors[R];
  for (int r = 0; r < R; ++r) peaks[r] = kLowest;
  for (int64_t first = 0; first < packed.count; first += kStretch) {
    const int64_t keys = std::min(kStretch, packed.count - first);
    const int64_t vectors = (keys + kLanesOfScores - 1) / kLanesOfScores;
    const int64_t whole = bias.data ? 0 : keys / kKeyPanel * kKeyPanel;
    start_scores<R>(bias, first + whole, keys - whole, scores + whole * R);

    Lanes most[R];
    for (int r = 0; r < R; ++r) most[r] = all(peaks[r]);
    const float* panel = packed.keys + first * head;
    for (int64_t j = 0; j < keys; j += kKeyPanel, panel += kKeyPanel * head) {
      if (keys - j > kLanesOfScores)
        score_head<R, V>(queries, panel, head, j >= whole, scale.before, scores + j * R, most);
      else
        score_head<R, 1>(queries, panel, head, true, scale.before, scores + j * R, most);
    }
    float above[R], added[R];
    reduce_rows<R>(most, above, [](auto& rows) { return largest_of_rows(rows); });

    Lanes lanes[R];
    exponentials<R>(scores, vectors, power, above, lanes);
    reduce_rows<R>(lanes, added, [](auto& rows) { return sums_of_rows<float>(rows); });
    const bool begun = first > 0;
    for (int r = 0; r < R; ++r) {
      factors[r] = begun ? power(all(peaks[r] - above[r]))[0] : 0;
      sums[r] = begun ? sums[r] * factors[r] + added[r] : added[r];
      peaks[r] = above[r];
    }
    weigh_all<R>(scores, packed.values + first * columns, columns, keys, begun ? factors : nullptr,
                 results);
  }
  for (int r = 0; r < R; ++r)
    if (peaks[r] == kLowest) sums[r] = __builtin_nanf("");
}

template <int R = kBlockQueries>
inline void attend_rows(int64_t rows, const PackedHead& packed, const BiasRows& bias,
                        const Scale& scale, const float* queries, float* scores, float* results,
                        float* sums) {
  if constexpr (R > 2) {
    if (rows <= R - 2)
      return attend_rows<R - 2>(rows, packed, bias, scale, queries, scores, results, sums);
  }
  attend_block<R>(packed, bias, scale, queries, scores, results, sums);
}

// out[i] = softmax(scale q[i] K^T + bias[i]) V for `queries` rows. bias: [queries][keys], null for
// none. workspace: attend_packed_workspace() floats, aligned to vectors. out may be q itself.
// Without keys the result is zero.
template <class In>
void attend_packed(const PackedHead& packed, const In* q, int64_t q_row, const float* bias,
                   int64_t bias_row, In* out, int64_t out_row, int64_t queries, float scale,
                   float* workspace) {
  const int64_t head = packed.head;
  Arena<float> arena(workspace);
  float* const rows = arena.take(kBlockQueries * kHeadRow);
  float* const results = arena.take(kBlockQueries * kHeadRow);
  float* const scores = arena.take(kBlockQueries * kStretch);
  if (packed.count == 0) {
    for (int64_t i = 0; i < queries; ++i)
      for (int64_t k = 0; k < head; ++k) out[i * out_row + k] = narrow<In>(0.0f);
    return;
  }
  const int64_t blocks = (queries + kBlockQueries - 1) / kBlockQueries;
  const Scale factors(scale, bias);
  for (int64_t block = 0, first = 0; block < blocks; ++block) {
    const int64_t last = queries * (block + 1) / blocks, count = last - first;
    for (int64_t r = 0; r < count; ++r)
      read_head(q + (first + r) * q_row, head, factors.of_query, rows + r * kHeadRow);
    if (count % 2) std::memset(rows + count * kHeadRow, 0, head * sizeof(float));
    float sums[kBlockQueries];
    attend_rows(count, packed, {bias ? bias + first * bias_row : nullptr, bias_row, count}, factors,
                rows, scores, results, sums);
    for (int64_t r = 0; r < count; ++r)
      write_head(results + r * kHeadRow, head, 1.0f / sums[r], out + (first + r) * out_row);
    first = last;
  }
}

// pack_head and attend_packed. workspace: attend_workspace(keys, head) floats, aligned to vectors.
template <class In>
void attend(const In* q, int64_t q_row, const In* k, int64_t k_row, const In* v, int64_t v_row,
            const float* bias, int64_t bias_row, In* out, int64_t out_row, int64_t queries,
            int64_t keys, int64_t head, float scale, float* workspace) {
  const PackedHead packed = pack_head(k, k_row, v, v_row, keys, head, workspace);
  attend_packed(packed, q, q_row, bias, bias_row, out, out_row, queries, scale,
                workspace + packed_head_size(keys, head));
}

}  // namespace
