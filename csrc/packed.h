// A weight of a linear layer, packed once for many products: see cpu/gemm.h.
//
// Panels of 16 output columns. Of float each is [k][16], so that a step of a product loads one line
// of the cache; of bfloat16 [k / 2][16][2], the pairs that one instruction multiplies and adds.
// The same layout for every instruction set. Columns and rows are filled up with zeros.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

namespace fastffn {

constexpr int64_t kPanel = 16;

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
  PackedLinear(const std::vector<LinearPart>& parts, int64_t k, bool half);

  const char* panel(int64_t index) const { return weights.get() + index * panel_bytes(); }
  int64_t panel_bytes() const { return steps() * kPanel * 4; }
  int64_t steps() const { return half ? (k + 1) / 2 : k; }
  int64_t columns() const { return panels * kPanel; }

  int64_t k = 0;
  int64_t panels = 0;
  bool half = false;            // bfloat16
  std::vector<int64_t> starts;  // the first column of each part
  std::unique_ptr<char[], FreeMemory> weights;
  std::unique_ptr<float[], FreeMemory> bias;  // zeros where there is none
};

inline int64_t whole_panels(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

}  // namespace fastffn
