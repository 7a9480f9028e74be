// Vectors as wide as the instruction set's registers, in the compiler's own notation (GCC, Clang):
// for kernels whose values must stay in registers across several loops, which plain loops over
// arrays cannot say. Included only by *.isa.cpp, as math.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "math.h"

namespace {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileVectors = 4;  // of a tile of two rows: 16 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTileVectors = 2;  // 8 accumulators of 16 registers
#else
constexpr int kVectorBytes = 16;
constexpr int kTileVectors = 2;
#endif

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef float loose __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef uint32_t bits __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t halves __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint16_t loose_halves
      __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef double loose __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};

template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int kWidth = kVectorBytes / sizeof(T);

template <class T>
inline __attribute__((always_inline)) Vector<T> load_vector(const T* from) {
  return *reinterpret_cast<const typename VectorOf<T>::loose*>(from);
}

// kWidth<float> numbers.
inline __attribute__((always_inline)) Vector<float> load_vector(const bfloat16* from) {
  typedef VectorOf<float>::bits Bits;
  const VectorOf<float>::halves halves =
      *reinterpret_cast<const VectorOf<float>::loose_halves*>(from);
  return reinterpret_cast<Vector<float>>(__builtin_convertvector(halves, Bits) << 16);
}

template <class T, size_t... lane>
inline __attribute__((always_inline)) Vector<T> repeat(T x, std::index_sequence<lane...>) {
  return Vector<T>{(static_cast<void>(lane), x)...};
}

template <class T>
inline __attribute__((always_inline)) Vector<T> all(T x) {
  return repeat<T>(x, std::make_index_sequence<kWidth<T>>{});
}

// Says that x is wanted in a register: compilers would rather read an operand from memory again
// each time that it is used.
template <class V>
inline __attribute__((always_inline)) void in_register(V& x) {
#if defined(__x86_64__)
  __asm__("" : "+v"(x));
#else
  static_cast<void>(x);
#endif
}

template <class T>
inline __attribute__((always_inline)) Vector<T> larger(Vector<T> a, Vector<T> b) {
  return a > b ? a : b;
}

// a b - c d, each product rounded: equal products leave nothing.
template <class V, class Factor>
inline __attribute__((always_inline)) V minus_product(V a, Factor b, V c, Factor d) {
  V first = a * b, second = c * d;
  in_register(first);
  in_register(second);
  return first - second;
}

// The numbered lanes, those of b counted on from a's.
template <int... lane, class V>
inline __attribute__((always_inline)) V pick(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, lane...);
#else
  typedef decltype(a < b) Mask;
  return __builtin_shuffle(a, b, Mask{lane...});
#endif
}

// One stage of the transposition of a matrix whose rows are vectors: exchanges the off-diagonal
// elements of the 2 x 2 blocks that rows `stage` apart form.
template <int stage, class V, int... lane>
inline __attribute__((always_inline)) void exchange(V& upper, V& lower,
                                                    std::integer_sequence<int, lane...>) {
  constexpr int kLanesHere = sizeof...(lane);
  const V first = pick<(lane & stage ? lane - stage + kLanesHere : lane)...>(upper, lower);
  const V second = pick<(lane & stage ? lane + kLanesHere : lane + stage)...>(upper, lower);
  upper = first;
  lower = second;
}

template <class T, int stage = 1>
inline __attribute__((always_inline)) void transpose(Vector<T> (&rows)[kWidth<T>]) {
  if constexpr (stage < kWidth<T>) {
#pragma GCC unroll 16
    for (int r = 0; r < kWidth<T>; ++r)
      if (!(r & stage))
        exchange<stage>(rows[r], rows[r + stage], std::make_integer_sequence<int, kWidth<T>>{});
    transpose<T, 2 * stage>(rows);
  }
}

// A vector whose lane r is the sum of rows[r], which are used up.
template <class T, int stage = 1>
inline __attribute__((always_inline)) Vector<T> sums_of_rows(Vector<T> (&rows)[kWidth<T>]) {
  if constexpr (stage < kWidth<T>) {
#pragma GCC unroll 16
    for (int r = 0; r < kWidth<T>; r += 2 * stage) {
      exchange<stage>(rows[r], rows[r + stage], std::make_integer_sequence<int, kWidth<T>>{});
      rows[r] += rows[r + stage];
    }
    return sums_of_rows<T, 2 * stage>(rows);
  } else {
    return rows[0];
  }
}

template <class T>
inline T largest(Vector<T> x) {
  T most = x[0];
  for (int i = 1; i < kWidth<T>; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

// 2^(n + f), |f| <= 1/2, with the whole number n in the low bits of `whole`. Relative error within
// 2e-7.
inline __attribute__((always_inline)) Vector<float> exp2_of_parts(Vector<float> whole,
                                                                  Vector<float> f) {
  typedef VectorOf<float>::bits Bits;
  Vector<float> p = f * 0.001326472032815218f + 0.00967151299118995f;
  p = p * f + 0.05550733953714371f;
  p = p * f + 0.24022242426872253f;
  p = p * f + 0.6931470036506653f;
  p = p * f + 1.0f;
  return reinterpret_cast<Vector<float>>(reinterpret_cast<Bits>(p) +
                                         (reinterpret_cast<Bits>(whole) << 23));
}

// 2^(x - shift) for x up to about shift, with an integral shift: it goes into the exponent, so that
// no digit of x is lost. Results below 2^-125 (2^-1000 of doubles) become that. The usual
// NaN and an infinite shift give NaN. Relative error within 2e-7.
template <class T>
struct ShiftedExp2 {
  explicit ShiftedExp2(T shift)
      : shift(all<T>(shift)), low(all<T>(shift - 125)), round(all<T>(12582912 - shift)) {}

  inline __attribute__((always_inline)) Vector<T> operator()(Vector<T> x) const {
    if constexpr (sizeof(T) == 4) {
      x = x < low ? low : x;
      // The constant leaves the nearest integer less the shift in the low bits of the sum, to be
      // added to an exponent.
      const Vector<T> shifted = x + round;
      const Vector<T> f = x - (shifted - round);
      return exp2_of_parts(shifted, f);
    } else {
      Vector<T> y;
      for (int i = 0; i < kWidth<T>; ++i) {
        const T power = x[i] - shift[i];
        y[i] = std::exp2(power < -1000 ? T(-1000) : power);
      }
      return y;
    }
  }

  Vector<T> shift;
  Vector<T> low;
  Vector<T> round;
};

// log2 of positive, normal numbers in two parts: a whole number, and the rest, below 1/2. In a
// difference of logarithms the whole parts cancel exactly.
template <class T>
struct Log2 {
  explicit Log2(Vector<T> x) {
    if constexpr (sizeof(T) == 4) {
      typedef typename VectorOf<T>::bits Bits;
      typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));
      // With the bits of sqrt(1/2) taken away, the exponent is that of x / m, m in [0.7, 1.4].
      const Bits exponent = (reinterpret_cast<Bits>(x) - 0x3f3504f3u) & 0xff800000u;
      const Vector<T> m = reinterpret_cast<Vector<T>>(reinterpret_cast<Bits>(x) - exponent);
      whole = __builtin_convertvector(reinterpret_cast<Integers>(exponent), Vector<T>) * 0x1p-23f;
      // log m = 2 (z + z^3 / 3 + ..), z = (m - 1) / (m + 1), |z| < 0.172.
      const Vector<T> z = (m - 1.0f) / (m + 1.0f), zz = z * z;
      Vector<T> p = zz * 0.32059890f + 0.41219858f;
      p = p * zz + 0.57707802f;
      p = p * zz + 0.96179669f;
      p = p * zz + 2.88539008f;
      rest = p * z;
      in_register(rest);  // rounded here: logarithms of equal numbers are equal
    } else {
      whole = Vector<T>{};
      for (int i = 0; i < kWidth<T>; ++i) rest[i] = std::log2(x[i]);
    }
  }

  Vector<T> whole;
  Vector<T> rest;
};

}  // namespace
