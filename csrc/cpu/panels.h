// Tokens as panels, the form in which the products of heads run at full width.
//
// A panel holds kWidth tokens, transposed: [columns][kWidth], so a head is some rows of it. Only
// real tokens are packed, so a kernel over panels knows no mask and skips padding; lanes past the
// last token hold zeros. Included only by *.isa.cpp.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../relation.h"
#include "block.h"
#include "vectors.h"

namespace {

using fastffn::Tokens;

// The real tokens of one example, in order, and their panels.
struct RealTokens {
  const int32_t* index;
  int64_t count;
  int64_t panels;
};

// Numbers from a panel to the next: an odd number of vectors, so that panels do not push each other
// out of the cache.
template <class T>
int64_t panel_size(int64_t columns) {
  return (columns | 1) * kWidth<T>;
}

template <class S>
const S* token(const Tokens& x, int64_t example, int64_t row, int64_t column) {
  return reinterpret_cast<const S*>(x.data) + example * x.batch + row * x.row + column * x.column;
}

// x * factor, any NaN as the usual one: ShiftedExp2 would take another's lowest bits for a number.
template <class T>
inline __attribute__((always_inline)) Vector<T> scaled(Vector<T> x, T factor) {
  const Vector<T> product = x * factor;
  return product == product ? product : all<T>(__builtin_nan(""));
}

template <class T, class S>
inline __attribute__((always_inline)) Vector<T> widened(const S* from) {
  if constexpr (std::is_same_v<S, T>) {
    return load_vector(from);
  } else if constexpr (std::is_same_v<S, bfloat16> && std::is_same_v<T, float>) {
    return load_vector(from);
  } else {
    T values[kWidth<T>];
#pragma omp simd
    for (int i = 0; i < kWidth<T>; ++i) values[i] = static_cast<T>(widen(from[i]));
    return load_vector(values);
  }
}

// Columns [first, first + width) of all `columns`, times `factor`.
template <class T, class S>
void pack_as(const Tokens& x, int64_t example, const RealTokens& real, int64_t first, int64_t width,
             int64_t columns, T factor, T* panels) {
  constexpr int W = kWidth<T>;
  const bool vectors = x.column == 1 && columns >= W;  // a window of W columns lies inside the row
  for (int64_t panel = 0; panel < real.panels; ++panel, panels += panel_size<T>(width)) {
    const int64_t tokens = std::min<int64_t>(W, real.count - panel * W);
    const int32_t* index = real.index + panel * W;
    if (!vectors) {
      for (int64_t k = 0; k < width; ++k) {
        T values[W] = {};
        for (int64_t r = 0; r < tokens; ++r)
          values[r] = static_cast<T>(widen(*token<S>(x, example, index[r], first + k)));
        *reinterpret_cast<Vector<T>*>(panels + k * W) = scaled<T>(load_vector(values), factor);
      }
      continue;
    }
    for (int64_t k = 0; k < width; k += W) {
      // The window of a row's last columns is moved back until it lies inside the row.
      const int64_t from = std::min(first + k, columns - W), skip = first + k - from;
      const int64_t kept = std::min<int64_t>(W, width - k);
      Vector<T> block[W];
      if (tokens == W) {
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r) block[r] = widened<T>(token<S>(x, example, index[r], from));
      } else {
        for (int64_t r = 0; r < W; ++r)
          block[r] = r < tokens ? widened<T>(token<S>(x, example, index[r], from)) : Vector<T>{};
      }
      transpose<T>(block);
      Vector<T>* to = reinterpret_cast<Vector<T>*>(panels + k * W);
      if (kept == W && skip == 0) {
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) to[j] = scaled<T>(block[j], factor);
      } else {
        for (int64_t j = 0; j < kept; ++j) to[j] = scaled<T>(block[skip + j], factor);
      }
    }
  }
}

// Writes panels, times `factor`, to the columns [first, first + width) of the real tokens' rows.
template <class T, class S>
void unpack_as(const T* panels, T factor, const RealTokens& real, int64_t first, int64_t width,
               const Tokens& x, int64_t example) {
  constexpr int W = kWidth<T>;
  for (int64_t panel = 0; panel < real.panels; ++panel, panels += panel_size<T>(width)) {
    const int64_t tokens = std::min<int64_t>(W, real.count - panel * W);
    for (int64_t k = 0; k < width; k += W) {
      const int64_t kept = std::min<int64_t>(W, width - k);
      Vector<T> block[W];
      if (kept == W) {
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) block[j] = load_vector(panels + (k + j) * W) * factor;
      } else {
        for (int64_t j = 0; j < W; ++j)
          block[j] = j < kept ? load_vector(panels + (k + j) * W) * factor : Vector<T>{};
      }
      transpose<T>(block);
      for (int64_t r = 0; r < tokens; ++r) {
        S* row = const_cast<S*>(token<S>(x, example, real.index[panel * W + r], first + k));
        S values[W];
#pragma omp simd
        for (int i = 0; i < W; ++i) values[i] = narrow<S>(block[r][i]);
        if (x.column != 1) {
          for (int64_t j = 0; j < kept; ++j) row[j * x.column] = values[j];
        } else if (kept == W) {
          std::memcpy(row, values, sizeof(values));
        } else {  // copies of a known size
          int64_t j = 0;
          for (; j + 4 <= kept; j += 4) std::memcpy(row + j, values + j, 4 * sizeof(S));
          for (; j < kept; ++j) row[j] = values[j];
        }
      }
    }
  }
}

template <class T>
void pack(const Tokens& x, int64_t example, const RealTokens& real, int64_t first, int64_t width,
          int64_t columns, T factor, T* panels) {
  switch (x.dtype) {
    case DType::kFloat32:
      return pack_as<T, float>(x, example, real, first, width, columns, factor, panels);
    case DType::kFloat64:
      return pack_as<T, double>(x, example, real, first, width, columns, factor, panels);
    case DType::kBFloat16:
      return pack_as<T, bfloat16>(x, example, real, first, width, columns, factor, panels);
    case DType::kFloat16:
      return pack_as<T, float16>(x, example, real, first, width, columns, factor, panels);
  }
}

template <class T>
void unpack(const T* panels, T factor, const RealTokens& real, int64_t first, int64_t width,
            const Tokens& x, int64_t example) {
  switch (x.dtype) {
    case DType::kFloat32:
      return unpack_as<T, float>(panels, factor, real, first, width, x, example);
    case DType::kFloat64:
      return unpack_as<T, double>(panels, factor, real, first, width, x, example);
    case DType::kBFloat16:
      return unpack_as<T, bfloat16>(panels, factor, real, first, width, x, example);
    case DType::kFloat16:
      return unpack_as<T, float16>(panels, factor, real, first, width, x, example);
  }
}

// Calls do(std::integral_constant<int, V>, j) for the panels [first, last), V of them from j on at
// a time: kTileVectors, and what is left at the end.
template <class Do>
inline __attribute__((always_inline)) void in_tiles(int64_t first, int64_t last, Do tile) {
  for (; first + kTileVectors <= last; first += kTileVectors)
    tile(std::integral_constant<int, kTileVectors>{}, first);
  switch (last - first) {
    case 3:
      return tile(std::integral_constant<int, 3>{}, first);
    case 2:
      return tile(std::integral_constant<int, 2>{}, first);
    case 1:
      return tile(std::integral_constant<int, 1>{}, first);
  }
}

// scores[r][v] += x_r . y_v for R tokens of panel x, from `lane` on, and V panels at y, `stride`
// apart; or -=.
template <class T, int R, int V, bool subtract = false>
inline __attribute__((always_inline)) void add_scores(const T* x, int64_t lane, const T* y,
                                                      int64_t width, int64_t stride,
                                                      Vector<T> (&scores)[R][V]) {
  constexpr int W = kWidth<T>;
  for (int64_t k = 0; k < width; ++k) {
    Vector<T> column[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      column[v] = load_vector(y + v * stride + k * W);
      in_register(column[v]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const T scalar = subtract ? -x[k * W + lane + r] : x[k * W + lane + r];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) scores[r][v] += column[v] * scalar;
    }
  }
}

// A panel's sum is made by itself and then added: rounding grows with the number of panels only.
template <class T, int K>
inline __attribute__((always_inline)) void add_columns(const Vector<T>* maps, const T* x, T* out) {
  constexpr int W = kWidth<T>;
  Vector<T> sum[K] = {};
#pragma GCC unroll 4
  for (int r = 0; r < W; ++r) {
    const Vector<T> row = maps[r];
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) sum[k] += row * x[k * W + r];
  }
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) *reinterpret_cast<Vector<T>*>(out + k * W) += sum[k];
}

// Panel out_j += sum_r maps[r][j] x_r, over the tokens r of panel x and j of panel out.
template <class T>
inline void add_mapped(const Vector<T>* maps, const T* x, int64_t width, T* out) {
  constexpr int W = kWidth<T>;
  for (; width >= 8; width -= 8, x += 8 * W, out += 8 * W) add_columns<T, 8>(maps, x, out);
  switch (width) {
    case 7:
      return add_columns<T, 7>(maps, x, out);
    case 6:
      return add_columns<T, 6>(maps, x, out);
    case 5:
      return add_columns<T, 5>(maps, x, out);
    case 4:
      return add_columns<T, 4>(maps, x, out);
    case 3:
      return add_columns<T, 3>(maps, x, out);
    case 2:
      return add_columns<T, 2>(maps, x, out);
    case 1:
      return add_columns<T, 1>(maps, x, out);
  }
}

}  // namespace
