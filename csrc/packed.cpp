#include "packed.h"

#include <cstring>
#include <new>

namespace fastffn {
namespace {

void* zeros(int64_t bytes) {
  constexpr int64_t kLine = 64;
  bytes = (bytes + kLine) / kLine * kLine;
  void* memory = std::aligned_alloc(kLine, bytes);
  if (!memory) throw std::bad_alloc();
  return std::memset(memory, 0, bytes);
}

// To the nearest, ties to even; a NaN stays one.
uint16_t to_bfloat16(float x) {
  const auto bits = __builtin_bit_cast(uint32_t, x);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 64);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace

PackedLinear::PackedLinear(const std::vector<LinearPart>& parts, int64_t k, bool half)
    : k(k), half(half) {
  for (const LinearPart& part : parts) {
    starts.push_back(columns());
    panels += whole_panels(part.n) / kPanel;
  }
  weights.reset(static_cast<char*>(zeros(panels * panel_bytes())));
  bias.reset(static_cast<float*>(zeros(columns() * sizeof(float))));
  for (size_t p = 0; p < parts.size(); ++p) {
    const LinearPart& part = parts[p];
    if (part.bias) std::memcpy(bias.get() + starts[p], part.bias, part.n * sizeof(float));
    for (int64_t column = 0; column < part.n; ++column) {
      char* panel = weights.get() + (starts[p] + column) / kPanel * panel_bytes();
      const int64_t lane = column % kPanel;
      const float* from = part.weight + column * k;
      for (int64_t i = 0; i < k; ++i) {
        if (half)
          reinterpret_cast<uint16_t*>(panel)[(i / 2 * kPanel + lane) * 2 + i % 2] =
              to_bfloat16(from[i]);
        else
          reinterpret_cast<float*>(panel)[i * kPanel + lane] = from[i];
      }
    }
  }
}

}  // namespace fastffn
