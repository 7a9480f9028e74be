#include "packed.h"

#include <algorithm>
#include <cmath>
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

PackedLinear::PackedLinear(const std::vector<LinearPart>& parts, int64_t k, Precision precision)
    : k(k), precision(precision) {
  for (const LinearPart& part : parts) {
    starts.push_back(columns());
    panels += whole_panels(part.n) / kPanel;
  }
  const auto vector = [this] { return static_cast<float*>(zeros(columns() * sizeof(float))); };
  weights.reset(static_cast<char*>(zeros(panels * panel_bytes())));
  bias.reset(vector());
  if (precision == Precision::kInt8) {
    scales.reset(vector());
    sums.reset(vector());
  }
  for (size_t p = 0; p < parts.size(); ++p) {
    const LinearPart& part = parts[p];
    if (part.bias) std::memcpy(bias.get() + starts[p], part.bias, part.n * sizeof(float));
    for (int64_t column = 0; column < part.n; ++column)
      pack_column(part.weight + column * k, starts[p] + column);
  }
}

void PackedLinear::pack_column(const float* from, int64_t column) {
  const int64_t numbers = numbers_of_step(precision), lane = column % kPanel;
  char* to = weights.get() + column / kPanel * panel_bytes() + lane * 4;
  const auto place = [to, numbers](int64_t i) {
    return to + i / numbers * kPanel * 4 + i % numbers * (4 / numbers);
  };
  if (precision == Precision::kFloat) {
    for (int64_t i = 0; i < k; ++i) std::memcpy(place(i), from + i, sizeof(float));
  } else if (precision == Precision::kBFloat16) {
    for (int64_t i = 0; i < k; ++i) {
      const uint16_t value = to_bfloat16(from[i]);
      std::memcpy(place(i), &value, sizeof(value));
    }
  } else {
    float most = 0, odd = 0;
    for (int64_t i = 0; i < k; ++i) {
      most = std::max(most, std::abs(from[i]));
      odd += from[i] * 0.0f;
    }
    // A NaN or an infinity makes the column NaN; numbers too small to be scaled are zero.
    const float scale = odd != 0 ? odd : most < 1e-30f ? 0 : most / 127;
    int64_t sum = 0;
    for (int64_t i = 0; i < k; ++i) {
      const long q = scale > 0 ? std::lround(from[i] / scale) : 0;
      *reinterpret_cast<int8_t*>(place(i)) = static_cast<int8_t>(q);
      sum += q;
    }
    scales[column] = scale;
    sums[column] = static_cast<float>(sum);
  }
}

}  // namespace fastffn
