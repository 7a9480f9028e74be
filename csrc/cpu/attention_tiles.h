// What attention.h is made of: products in tiles that stay in registers, and the softmax between
// them. Included only by *.isa.cpp.
//
// A block is kKeyPanel keys against R queries. Keys lie in panels, transposed: [head
// size][kKeyPanel]. Scores lie block by block, [blocks][R][kKeyPanel], so that every address within
// a block is a constant away from its beginning. Rows of queries and of results are kHeadRow
// numbers apart for the same reason. R is even: a block of fewer queries is filled up with zeros.
#pragma once

#include <limits>

#include "../attention.h"
#include "panels.h"

namespace {

constexpr int kLanesOfScores = kWidth<float>;
constexpr int kKeyPanel = 2 * kLanesOfScores;  // keys: two vectors for every number of a query
#if defined(__AVX512F__)
constexpr int kBlockQueries = 12;  // of a block at most: 24 accumulators of 32 registers
constexpr int kResultSums = 24;    // of a tile of results
constexpr int kResultVectors = 4;  // of a tile at most
#else
constexpr int kBlockQueries = 6;  // 12 of 16 registers
constexpr int kResultSums = 12;
constexpr int kResultVectors = 2;
#endif
constexpr int64_t kHeadRow =
    fastffn::kMaxHeadSize + 16;  // not a power of two: rows would share places in the cache

constexpr int64_t kHeadPiece = 64;  // numbers of a head whose products are added up in one go

// Keys whose scores are kept at a time, in L1 with the panels that stream by. A multiple of
// kKeyPanel.
constexpr int64_t kStretch = 512;

constexpr float kLowest = std::numeric_limits<float>::lowest();

typedef Vector<float> Lanes;

// Scores of R queries and V vectors of keys; times `factor` and added to what is there if
// `started`. `most`, unless null, follows each row's largest, lane by lane.
template <int R, int V>
inline __attribute__((always_inline)) void score(const float* queries, const float* panel,
                                                 int64_t head, bool started, float factor,
                                                 float* scores, Lanes* most) {
  Lanes sum[R][V] = {};
  for (int64_t k = 0; k < head; ++k) {
    Lanes column[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      column[v] = load_vector(panel + k * kKeyPanel + v * kLanesOfScores);
      in_register(column[v]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Lanes query = all(queries[r * kHeadRow + k]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] += column[v] * query;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Lanes* to = reinterpret_cast<Lanes*>(scores + r * kKeyPanel) + v;
      if (started) {
        sum[r][v] *= factor;
        in_register(sum[r][v]);  // rounded for every R, else a row's bits depend on its block
        sum[r][v] += *to;
      }
      *to = sum[r][v];
      if (most) most[r] = larger<float>(sum[r][v], most[r]);
    }
  }
}

// The same for a head of any size: sums of many products are made in pieces, for less rounding.
template <int R, int V>
void score_head(const float* queries, const float* panel, int64_t head, bool started, float factor,
                float* scores, Lanes* most) {
  for (bool last = false; !last; started = true) {
    last = head <= kHeadPiece + kHeadPiece / 2;
    const int64_t piece = last ? head : kHeadPiece;
    score<R, V>(queries, panel, piece, started, factor, scores, last ? most : nullptr);
    queries += piece;
    panel += piece * kKeyPanel;
    head -= piece;
  }
}

// A vector whose lane r is the largest number of rows[r], which are used up.
template <int stage = 1>
inline __attribute__((always_inline)) Lanes largest_of_rows(Lanes (&rows)[kLanesOfScores]) {
  if constexpr (stage < kLanesOfScores) {
#pragma GCC unroll 16
    for (int r = 0; r < kLanesOfScores; r += 2 * stage) {
      exchange<stage>(rows[r], rows[r + stage], std::make_integer_sequence<int, kLanesOfScores>{});
      rows[r] = larger<float>(rows[r], rows[r + stage]);
    }
    return largest_of_rows<2 * stage>(rows);
  } else {
    return rows[0];
  }
}

// Calls reduce(a square of rows) for the R rows; to[r] is what it gives for rows[r].
template <int R, class Reduce>
inline __attribute__((always_inline)) void reduce_rows(const Lanes (&rows)[R], float* to,
                                                       Reduce reduce) {
  constexpr int W = kLanesOfScores;
#pragma GCC unroll 16
  for (int first = 0; first < R; first += W) {
    Lanes square[W];
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) square[r] = first + r < R ? rows[first + r] : rows[first];
    const Lanes reduced = reduce(square);
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r)
      if (first + r < R) to[first + r] = reduced[r];
  }
}

// 2^(factor x) for x up to 0 and a positive factor. Results below 2^-125 become that. The factor
// is applied here and not to the queries, where it would cost a rounding of each.
struct ScaledExp2 {
  explicit ScaledExp2(float factor)
      : factor(all(factor)), low(all(-125 / factor < kLowest ? kLowest : -125 / factor)) {}

  inline __attribute__((always_inline)) Lanes operator()(Lanes x) const {
    constexpr float kRound = 12582912;  // see ShiftedExp2
    x = x < low ? low : x;
    const Lanes shifted = x * factor + kRound;
    return exp2_of_parts(shifted, x * factor - (shifted - kRound));
  }

  Lanes factor;
  Lanes low;
};

// Scores become the powers of what their row's peak is above them. The sum of each row, over
// `vectors` of keys, is left lane by lane.
template <int R>
inline void exponentials(float* scores, int64_t vectors, const ScaledExp2& power,
                         const float* peaks, Lanes (&sums)[R]) {
  for (int r = 0; r < R; ++r) {
    const Lanes peak = all(peaks[r]);
    Lanes even{}, odd{};
    float* row = scores + r * kKeyPanel;
    int64_t left = vectors;
    for (; left >= 2; left -= 2, row += R * kKeyPanel) {
      Lanes* block = reinterpret_cast<Lanes*>(row);
      block[0] = power(block[0] - peak);
      block[1] = power(block[1] - peak);
      even += block[0];
      odd += block[1];
    }
    if (left) {
      Lanes* block = reinterpret_cast<Lanes*>(row);
      block[0] = power(block[0] - peak);
      even += block[0];
    }
    sums[r] = even + odd;
  }
}

// results = results * factors + weights values, for N of a block's queries and V vectors of the
// values' columns; without factors the results are only written.
template <int N, int V>
inline __attribute__((always_inline)) void weigh_tile(const float* weights, int64_t block,
                                                      const float* values, int64_t columns,
                                                      int64_t keys, const float* factors,
                                                      float* results) {
  Lanes sum[N][V] = {};
  for (; keys > 0; keys -= kKeyPanel, weights += block) {
    const int64_t here = keys < kKeyPanel ? keys : kKeyPanel;
    for (int64_t j = 0; j < here; ++j, values += columns) {
      Lanes row[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        row[v] = load_vector(values + v * kLanesOfScores);
        in_register(row[v]);
      }
#pragma GCC unroll 16
      for (int r = 0; r < N; ++r) {
        const Lanes weight = all(weights[r * kKeyPanel + j]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] += row[v] * weight;
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < N; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Lanes* to = reinterpret_cast<Lanes*>(results + r * kHeadRow) + v;
      *to = factors ? *to * factors[r] + sum[r][v] : sum[r][v];
    }
  }
}

// The same for all R queries, in as few equal tiles as the registers allow.
template <int R, int V>
void weigh(const float* weights, const float* values, int64_t columns, int64_t keys,
           const float* factors, float* results) {
  constexpr int kTiles = (R * V + kResultSums - 1) / kResultSums;
  constexpr int N = (R + kTiles - 1) / kTiles;
  int r = 0;
  for (; r + N <= R; r += N)
    weigh_tile<N, V>(weights + r * kKeyPanel, R * kKeyPanel, values, columns, keys,
                     factors ? factors + r : nullptr, results + r * kHeadRow);
  if constexpr (R % N != 0)
    weigh_tile<R % N, V>(weights + r * kKeyPanel, R * kKeyPanel, values, columns, keys,
                         factors ? factors + r : nullptr, results + r * kHeadRow);
}

// All columns of the values: `columns` is a multiple of a vector.
template <int R>
void weigh_all(const float* weights, const float* values, int64_t columns, int64_t keys,
               const float* factors, float* results) {
  const int64_t vectors = columns / kLanesOfScores;
  const int64_t tiles = (vectors + kResultVectors - 1) / kResultVectors;
  int64_t first = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t next = vectors * (tile + 1) / tiles;
    const float* from = values + first * kLanesOfScores;
    float* to = results + first * kLanesOfScores;
    switch (next - first) {
      case 1:
        weigh<R, 1>(weights, from, columns, keys, factors, to);
        break;
      case 2:
        weigh<R, 2>(weights, from, columns, keys, factors, to);
        break;
      case 3:
        if constexpr (kResultVectors > 2) weigh<R, 3>(weights, from, columns, keys, factors, to);
        break;
      case 4:
        if constexpr (kResultVectors > 2) weigh<R, 4>(weights, from, columns, keys, factors, to);
        break;
    }
    first = next;
  }
}

}  // namespace
