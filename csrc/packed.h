// A weight of a linear layer, packed once for many products: see cpu/gemm.h.
//
// Panels of 16 output columns. Of float each is [k][16], so that a step of a product loads one line
// of the cache; of bfloat16 [k / 2][16][2] and of int8 [k / 4][16][4], the numbers that one
// instruction multiplies and adds. The same layout for every instruction set. Columns and rows are
// filled up with zeros.
//
// int8: w = scale * q, a scale for each output column, q from -127 to 127.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

namespace fastffn {

constexpr int64_t kPanel = 16;

enum class Precision { kFloat, kBFloat16, kInt8 };

// Numbers of k that a step of a product takes, in four bytes a column.
constexpr int64_t numbers_of_step(Precision precision) {
  return precision == Precision::kInt8 ? 4 : precision == Precision::kBFloat16 ? 2 : 1;
}

struct FreeMemory {
  void operator()(void* memory) const { std::free(memory); }
};

// One of the matrices that a PackedLinear holds side by side.
struct LinearPart {
  const float* weight;  // [n, k], contiguous
  const float* bias;    // [n], or null
  int64_t n;
};

// x -> x W^T + b, of one or more weights with the same input: each begins at a panel of its own.
struct PackedLinear {
  PackedLinear() = default;
  PackedLinear(const std::vector<LinearPart>& parts, int64_t k, Precision precision);

  const char* panel(int64_t index) const { return weights.get() + index * panel_bytes(); }
  int64_t panel_bytes() const { return steps() * kPanel * 4; }
  int64_t steps() const {
    const int64_t numbers = numbers_of_step(precision);
    return (k + numbers - 1) / numbers;
  }
  int64_t columns() const { return panels * kPanel; }

  int64_t k = 0;
  int64_t panels = 0;
  Precision precision = Precision::kFloat;
  std::vector<int64_t> starts;  // the first column of each part
  std::unique_ptr<char[], FreeMemory> weights;
  std::unique_ptr<float[], FreeMemory> bias;    // zeros where there is none
  std::unique_ptr<float[], FreeMemory> scales;  // of int8: of each column,
  std::unique_ptr<float[], FreeMemory> sums;    // and the sum of its q

 private:
  void pack_column(const float* from, int64_t column);
};

inline int64_t whole_panels(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

}  // namespace fastffn
