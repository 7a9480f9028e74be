// Matrix products with a weight that was packed once, for inference: C = A B + bias. Included only
// by *.isa.cpp.
//
//   A    [rows, k]   row-major, any row stride; float, or bfloat16 with a bfloat16 weight
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

constexpr int kPanelVectors = kPanel / kWidth<float>;
#if defined(__AVX512F__)
constexpr int kTileRows = 12, kTilePanels = 2;  // 24 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTilePanels = 1;  // 12 of 16
#else
constexpr int kTileRows = 3, kTilePanels = 1;  // 12 of 16
#endif

// Two numbers of bfloat16, as the processor multiplies them.
using Pair = uint32_t;

struct Tile {
  const char* a;
  int64_t a_row;  // bytes
  const char* b;
  int64_t b_panel;  // bytes
  int64_t steps;    // k, of bfloat16 half of it
  const float* bias;
  float* c;
  int64_t c_row;  // elements
};

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
  for (int64_t i = 0; i < at.steps; ++i, a += sizeof(float), b += kPanel * sizeof(float)) {
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
// Compiled for processors that have the instruction; called only on those (`multiplies_halves`).
template <int kRows, int kPanels>
__attribute__((target("avx512bf16"))) void half_tile(const Tile& at) {
  __m512 sum[kRows][kPanels];
#pragma GCC unroll 16
  for (int v = 0; v < kPanels; ++v)
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) sum[r][v] = _mm512_loadu_ps(at.bias + v * kPanel);
  const char* a = at.a;
  const char* b = at.b;
  for (int64_t i = 0; i < at.steps; ++i, a += sizeof(Pair), b += kPanel * sizeof(Pair)) {
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
#else
  static constexpr const Kernel* of_half = nullptr;
#endif

  static const Kernel* of(const PackedLinear& weight) { return weight.half ? of_half : of_float; }
};
template <int kPanels>
using TilesOf = Tiles<kPanels, std::make_index_sequence<kTileRows>>;

// The product of some rows; `c` has room for all panels. What lies in columns beyond those of the
// weight becomes zero.
//
//   a      of the weight's element type; of bfloat16 rows are readable up to a multiple of two
//   a_row  elements
inline void multiply(const void* a, int64_t a_row, const PackedLinear& weight, float* c,
                     int64_t c_row, int64_t rows) {
  const int64_t element = weight.half ? sizeof(uint16_t) : sizeof(float);
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t panel = 0; panel < weight.panels;) {
    const bool wide = kTilePanels == 2 && panel + 2 <= weight.panels;
    const Kernel* kernels = wide ? TilesOf<kTilePanels>::of(weight) : TilesOf<1>::of(weight);
    Tile tile{nullptr,
              a_row * element,
              weight.panel(panel),
              weight.panel_bytes(),
              weight.steps(),
              weight.bias.get() + panel * kPanel,
              nullptr,
              c_row};
    for (int64_t t = 0; t < tiles; ++t) {  // of even sizes: no tile is much shorter than another
      const int64_t first = rows * t / tiles, last = rows * (t + 1) / tiles;
      tile.a = static_cast<const char*>(a) + first * tile.a_row;
      tile.c = c + first * c_row + panel * kPanel;
      kernels[last - first - 1](tile);
    }
    panel += wide ? 2 : 1;
  }
}

// One thread's products of float rows with weights of either type.
class Product {
 public:
  // rows, k: the most of a call.
  Product(int64_t rows, int64_t k, bool half)
      : halves_(half ? allocate<bfloat16>(rows * row_of(k)) : nullptr) {}

  void operator()(const float* a, int64_t a_row, const PackedLinear& weight, float* c,
                  int64_t c_row, int64_t rows) {
    if (!weight.half) return multiply(a, a_row, weight, c, c_row, rows);
    const int64_t row = row_of(weight.k);
    for (int64_t r = 0; r < rows; ++r) {
      bfloat16* to = halves_.get() + r * row;
      const float* from = a + r * a_row;
#pragma omp simd
      for (int64_t i = 0; i < weight.k; ++i) to[i] = narrow<bfloat16>(from[i]);
      to[weight.k] = narrow<bfloat16>(0.0f);  // the second of the last pair, if k is odd
    }
    multiply(halves_.get(), row, weight, c, c_row, rows);
  }

 private:
  static int64_t row_of(int64_t k) { return k / 32 * 32 + 32; }

  const Memory<bfloat16> halves_;
};

}  // namespace
