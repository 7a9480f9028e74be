// Scalar functions that the compiler turns into vector code, and the storage formats.
//
// Included only by *.isa.cpp, which is compiled once per instruction set: everything has internal
// linkage, and no function of the standard library is called in fp32 (a shared inline function
// compiled for AVX-512 could be the copy that the linker keeps for all). No intrinsics: each
// function is straight-line code without branches, which GCC and Clang vectorise for any width.
//
// fp32 accuracy, measured over the whole range by tests/test_math.py: within 4 ulp. exp flushes
// results below 2^-125 to zero. fp64 exists for gradcheck and calls libm.
#pragma once

#include <cmath>
#include <cstdint>

namespace {

inline uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
inline float float_of(uint32_t x) { return __builtin_bit_cast(float, x); }

template <class T>
inline T where(bool condition, T then, T otherwise) {
  return condition ? then : otherwise;
}

// NaN if either is NaN, as torch.maximum.
template <class T>
inline T maximum(T a, T b) {
  return (a > b) | (a != a) ? a : b;
}

// e^x = 2^n (1 + tail) with x = n ln2 + r, |r| <= ln2 / 2. Adding kRound, 1.5 * 2^23, leaves the
// nearest integer in the low bits of the sum; with `bias` added too, the shift turns those bits
// into 2^(n - 127 + bias).
struct ExpParts {
  float scale;
  float tail;
};

template <int bias>
inline ExpParts exp_parts(float x) {
  constexpr float kRound = 12582912.0f + bias;
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float q = 0.00139475951f;
  q = q * r + 0.00836724695f;
  q = q * r + 0.0416662656f;
  q = q * r + 0.166665375f;
  q = q * r + 0.5f;
  return {float_of(bits_of(shifted) << 23), r + (r * r) * q};
}

// Keeps a NaN.
inline float clamp(float x, float low, float high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// Over the whole range: half the scale leaves room for 2^128, which makes an overflow infinite.
inline float exp(float x) {
  const ExpParts e = exp_parts<126>(clamp(x, -87.33f, 88.8f));
  return (e.scale * e.tail + e.scale) * 2.0f;
}

inline float expm1(float x) {
  const ExpParts e = exp_parts<126>(clamp(x, -87.33f, 88.8f));
  return (e.scale * e.tail + (e.scale - 0.5f)) * 2.0f;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }

// By way of e^2x - 1, which keeps its relative accuracy around zero.
inline float tanh(float x) {
  const ExpParts e = exp_parts<127>(clamp(2.0f * x, -20.0f, 20.0f));
  const float y = e.scale * e.tail + (e.scale - 1.0f);
  return y / (y + 2.0f);
}

// Below 1 an odd polynomial, above it 1 - e^-g(|x|); both fitted for least relative error of erf.
inline float erf(float x) {
  const float magnitude = x < 0.0f ? -x : x;
  const float z = x * x;
  float p = -0.000566015311f;
  p = p * z + 0.00492478907f;
  p = p * z - 0.0267177075f;
  p = p * z + 0.112804114f;
  p = p * z - 0.376123548f;
  p = p * z + 1.12837911f;
  const float m = magnitude > 4.0f ? 4.0f : magnitude;
  float g = 0.00115722616f;
  g = g * m - 0.0148318848f;
  g = g * m + 0.0887998417f;
  g = g * m + 0.654239893f;
  g = g * m + 1.11762142f;
  g = g * m + 0.00261913985f;
  const ExpParts e = exp_parts<127>(-g);
  const float tail = 1.0f - (e.scale * e.tail + e.scale);
  return magnitude < 1.0f ? p * x : (x < 0.0f ? -tail : tail);
}

inline double exp(double x) { return std::exp(x); }
inline double expm1(double x) { return std::expm1(x); }
inline double tanh(double x) { return std::tanh(x); }
inline double erf(double x) { return std::erf(x); }
inline double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

// Storage formats as integers, so that no compiler support for them is needed.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bfloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

inline float widen(float16 x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const float finite = float_of(magnitude) * 0x1p112f;  // subnormals become normal here
  const uint32_t bits = (x.bits & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : bits_of(finite);
  return float_of(bits | sign);
}

// Round to nearest, ties to even; a NaN stays one.
inline bfloat16 to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(x != x ? 0x7fc0u : rounded)};
}

inline float16 to_float16(float x) {
  const uint32_t sign = bits_of(x) & 0x80000000u;
  const uint32_t magnitude = bits_of(x) ^ sign;
  // Normal results: drop 13 bits, rounding in the integer; the exponent's bias changes by 112.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results: adding 0.5 lines the last bit up with that of the result.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return {static_cast<uint16_t>(half | (sign >> 16))};
}

template <class S, class T>
inline S narrow(T x) {
  if constexpr (sizeof(S) >= 4) {
    return static_cast<S>(x);
  } else if constexpr (__is_same(S, bfloat16)) {
    return to_bfloat16(static_cast<float>(x));
  } else {
    return to_float16(static_cast<float>(x));
  }
}

}  // namespace
