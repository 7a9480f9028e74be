// Matrix products with a weight that was packed once, for inference: C = A B + bias. Included only
// by *.isa.cpp.
//
//   A    [rows, k]   row-major, any row stride; float, or what goes with the weight: bfloat16, and
//                    with int8 weights uint8, a = scale (q - zero) with both for each row
//   B    panels of 16 columns, see ../packed.h
//   C    [rows, panels * 16], float
//
// A tile of kTileRows x (one or two panels) of C stays in registers over the whole of k: one load
// of B serves all its rows, and A is read where it lies, one number broadcast at a time. No loop
// over pieces of k: those of an encoder, some hundred, leave a tile's part of A in L1 and a panel
// of B in L2 as it is.
//
// Why not torch's: MKL uses no AVX-512 on processors of other makers, oneDNN is reached through a
// private operator which costs 12 microseconds a call and generates code for each new number of
// rows, and what follows a product here runs on its result while that is still in L2.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "../packed.h"
#include "arena.h"
#include "vectors.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

using fastffn::kPanel;
using fastffn::PackedLinear;
using fastffn::Precision;

constexpr int kPanelVectors = kPanel / kWidth<float>;
#if defined(__AVX512F__)
constexpr int kTileRows = 12, kTilePanels = 2;  // 24 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTilePanels = 1;  // 12 of 16
#else
constexpr int kTileRows = 3, kTilePanels = 1;  // 12 of 16
#endif

// What a row of A was quantised with.
struct RowScale {
  float scale;
  float zero;
};

struct Tile {
  const char* a;
  int64_t a_row;  // bytes
  const char* b;
  int64_t b_panel;  // bytes
  int64_t steps;
  const char* next;  // of the weight, to be fetched meanwhile: so many bytes a step
  int64_t next_step;
  const float* bias;
  const float* scales;   // of the columns of an int8 weight,
  const float* sums;     // their sums
  const RowScale* rows;  // and the rows of A
  float* c;
  int64_t c_row;  // elements
};

// A weight comes from memory or L3 once for a block of rows; the first tile of each panel would
// wait for it. So each tile fetches its share of the next panels into L2.
template <int kPanels>
inline __attribute__((always_inline)) void fetch(const char* next, int64_t panel) {
#pragma GCC unroll 16
  for (int v = 0; v < kPanels; ++v) __builtin_prefetch(next + v * panel, 0, 2);
}

template <int kRows, int kPanels>
void float_tile(const Tile& at) {
  constexpr int kVectors = kPanels * kPanelVectors;
  Vector<float> sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    const Vector<float> bias = load_vector(at.bias + v * kWidth<float>);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) sum[r][v] = bias;
  }
  const char* a = at.a;
  const char* b = at.b;
  const char* next = at.next;
  for (int64_t i = 0; i < at.steps; ++i, a += 4, b += kPanel * 4, next += at.next_step) {
    fetch<kPanels>(next, at.b_panel);
    Vector<float> column[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v)
      column[v] = load_vector(reinterpret_cast<const float*>(b + v / kPanelVectors * at.b_panel) +
                              v % kPanelVectors * kWidth<float>);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      Vector<float> x = all(*reinterpret_cast<const float*>(a + r * at.a_row));
      if constexpr (kVectors > 1) in_register(x);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[r][v] += x * column[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v)
      *reinterpret_cast<typename VectorOf<float>::loose*>(at.c + r * at.c_row + v * kWidth<float>) =
          sum[r][v];
}

#if defined(__AVX512F__)
// The next two are compiled for processors that have the instruction, and called only on those
// (dispatch.h, `multiplies`).
template <int kRows, int kPanels>
__attribute__((target("avx512bf16"))) void half_tile(const Tile& at) {
  __m512 sum[kRows][kPanels];
#pragma GCC unroll 16
  for (int v = 0; v < kPanels; ++v)
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) sum[r][v] = _mm512_loadu_ps(at.bias + v * kPanel);
  const char* a = at.a;
  const char* b = at.b;
  const char* next = at.next;
  for (int64_t i = 0; i < at.steps; ++i, a += 4, b += kPanel * 4, next += at.next_step) {
    fetch<kPanels>(next, at.b_panel);
    __m512i column[kPanels];
#pragma GCC unroll 16
    for (int v = 0; v < kPanels; ++v) column[v] = _mm512_loadu_si512(b + v * at.b_panel);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const __m512i x = _mm512_set1_epi32(*reinterpret_cast<const int*>(a + r * at.a_row));
#pragma GCC unroll 16
      for (int v = 0; v < kPanels; ++v)
        sum[r][v] = _mm512_dpbf16_ps(sum[r][v], (__m512bh)x, (__m512bh)column[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < kPanels; ++v) _mm512_storeu_ps(at.c + r * at.c_row + v * kPanel, sum[r][v]);
}

// As _mm512_cvtepi32_ps, of which GCC 12 warns.
inline __m512 in_float(__m512i x) { return (__m512) __builtin_convertvector((__v16si)x, __v16sf); }

template <int kRows, int kPanels>
__attribute__((target("avx512vnni"))) void byte_tile(const Tile& at) {
  __m512i sum[kRows][kPanels];
#pragma GCC unroll 16
  for (int v = 0; v < kPanels; ++v)
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) sum[r][v] = _mm512_setzero_si512();
  const char* a = at.a;
  const char* b = at.b;
  const char* next = at.next;
  for (int64_t i = 0; i < at.steps; ++i, a += 4, b += kPanel * 4, next += at.next_step) {
    fetch<kPanels>(next, at.b_panel);
    __m512i column[kPanels];
#pragma GCC unroll 16
    for (int v = 0; v < kPanels; ++v) column[v] = _mm512_loadu_si512(b + v * at.b_panel);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const __m512i x = _mm512_set1_epi32(*reinterpret_cast<const int*>(a + r * at.a_row));
#pragma GCC unroll 16
      for (int v = 0; v < kPanels; ++v)  // written out: GCC 12 moves each sum before it adds
        __asm__("vpdpbusd %2, %1, %0" : "+v"(sum[r][v]) : "v"(x), "v"(column[v]));
    }
  }
  // c = scale_row scale_column (sum - zero_row sum_column) + bias
#pragma GCC unroll 16
  for (int v = 0; v < kPanels; ++v) {
    const __m512 bias = _mm512_loadu_ps(at.bias + v * kPanel);
    const __m512 scale = _mm512_loadu_ps(at.scales + v * kPanel);
    const __m512 sums = _mm512_loadu_ps(at.sums + v * kPanel);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const RowScale row = at.rows[r];
      const __m512 product = _mm512_fnmadd_ps(_mm512_set1_ps(row.zero), sums, in_float(sum[r][v]));
      const __m512 both = _mm512_mul_ps(_mm512_set1_ps(row.scale), scale);
      _mm512_storeu_ps(at.c + r * at.c_row + v * kPanel, _mm512_fmadd_ps(product, both, bias));
    }
  }
}
#endif

using Kernel = void (*)(const Tile&);

// By number of rows, less one.
template <int kPanels, class Rows>
struct Tiles;
template <int kPanels, size_t... row>
struct Tiles<kPanels, std::index_sequence<row...>> {
  static constexpr Kernel of_float[] = {float_tile<row + 1, kPanels>...};
#if defined(__AVX512F__)
  static constexpr Kernel of_half[] = {half_tile<row + 1, kPanels>...};
  static constexpr Kernel of_bytes[] = {byte_tile<row + 1, kPanels>...};
#else
  static constexpr const Kernel *of_half = nullptr, *of_bytes = nullptr;
#endif

  static const Kernel* of(Precision precision) {
    return precision == Precision::kInt8       ? of_bytes
           : precision == Precision::kBFloat16 ? of_half
                                               : of_float;
  }
};
template <int kPanels>
using TilesOf = Tiles<kPanels, std::make_index_sequence<kTileRows>>;

// The product of some rows; `c` has room for all panels. What lies in columns beyond those of the
// weight becomes zero.
//
//   a       rows that are readable up to a whole step, zero there
//   a_row   bytes
//   scales  of the rows, with an int8 weight
inline void multiply(const void* a, int64_t a_row, const RowScale* scales,
                     const PackedLinear& weight, float* c, int64_t c_row, int64_t rows) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t panel = 0; panel < weight.panels;) {
    const bool wide = kTilePanels == 2 && panel + 2 <= weight.panels;
    const Kernel* kernels =
        wide ? TilesOf<kTilePanels>::of(weight.precision) : TilesOf<1>::of(weight.precision);
    Tile tile{};
    tile.a_row = a_row;
    tile.b = weight.panel(panel);
    tile.b_panel = weight.panel_bytes();
    tile.steps = weight.steps();
    tile.bias = weight.bias.get() + panel * kPanel;
    if (scales) {
      tile.scales = weight.scales.get() + panel * kPanel;
      tile.sums = weight.sums.get() + panel * kPanel;
    }
    tile.c_row = c_row;
    const int64_t after = panel + (wide ? 2 : 1);
    const char* next = weight.panel(after < weight.panels ? after : 0);
    tile.next_step = (kPanel * 4 + tiles - 1) / tiles;
    for (int64_t t = 0; t < tiles; ++t) {  // of even sizes: no tile is much shorter than another
      const int64_t first = rows * t / tiles, last = rows * (t + 1) / tiles;
      tile.a = static_cast<const char*>(a) + first * a_row;
      tile.next = next + t * tile.next_step * tile.steps;
      tile.rows = scales + (scales ? first : 0);
      tile.c = c + first * c_row + panel * kPanel;
      kernels[last - first - 1](tile);
    }
    panel = after;
  }
}

// q with a = scale (q - zero), the range of the row's numbers and 0 over 0 .. 255. A row that holds
// a NaN or an infinity becomes NaN.
inline RowScale quantise(const float* a, int64_t k, uint8_t* q) {
  float low = 0, high = 0, odd = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(+ : odd)
  for (int64_t i = 0; i < k; ++i) {
    low = a[i] < low ? a[i] : low;
    high = a[i] > high ? a[i] : high;
    odd += a[i] * 0.0f;
  }
  if (odd != 0) {  // a NaN
    std::memset(q, 0, k);
    return {odd, 0};
  }
  // Numbers too small to be divided by are zero.
  const float range = high / 255 - low / 255;
  const float scale = range > 1e-30f ? range : 1.0f, inverse = 1 / scale;
  const float zero = static_cast<float>(static_cast<int>(-low * inverse + 0.5f));
#pragma omp simd
  for (int64_t i = 0; i < k; ++i) {
    const float x = a[i] * inverse + zero + 0.5f;
    q[i] = static_cast<uint8_t>(static_cast<int>(x > 255 ? 255.0f : x < 0 ? 0.0f : x));
  }
  return {scale, zero};
}

// One thread's products of float rows with weights of any precision.
class Product {
 public:
  // rows, k: the most of a call.
  Product(int64_t rows, int64_t k, Precision precision)
      : rows_(precision == Precision::kFloat ? 0 : rows),
        converted_(allocate<char>(rows_ * row_of(k, precision) + kLine)),
        scales_(allocate<RowScale>(rows_ + 1)) {}

  void operator()(const float* a, int64_t a_row, const PackedLinear& weight, float* c,
                  int64_t c_row, int64_t rows) {
    const int64_t k = weight.k, row = row_of(k, weight.precision);
    if (weight.precision == Precision::kFloat)
      return multiply(a, a_row * sizeof(float), nullptr, weight, c, c_row, rows);
    const bool bytes = weight.precision == Precision::kInt8;
    for (int64_t r = 0; r < rows; ++r) {
      char* to = converted_.get() + r * row;
      const int64_t used = bytes ? k : 2 * k;
      std::memset(to + used, 0, sizeof(float));  // the rest of the last step
      if (bytes) {
        scales_[r] = quantise(a + r * a_row, k, reinterpret_cast<uint8_t*>(to));
      } else {
        const float* from = a + r * a_row;
        bfloat16* halves = reinterpret_cast<bfloat16*>(to);
#pragma omp simd
        for (int64_t i = 0; i < k; ++i) halves[i] = narrow<bfloat16>(from[i]);
      }
    }
    multiply(converted_.get(), row, bytes ? scales_.get() : nullptr, weight, c, c_row, rows);
  }

 private:
  static constexpr int64_t kLine = 64;
  // Bytes of a converted row: room for a step more.
  static int64_t row_of(int64_t k, Precision precision) {
    const int64_t used = precision == Precision::kInt8 ? k : 2 * k;
    return used / kLine * kLine + 2 * kLine;
  }

  const int64_t rows_;
  const Memory<char> converted_;
  const Memory<RowScale> scales_;
};

}  // namespace
