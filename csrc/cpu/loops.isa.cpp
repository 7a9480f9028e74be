// The vectorised loop of every opcode, generated from the table of primitives.

#include "block.h"

namespace {

using fastffn::FASTFFN_ISA::Loop;

// One loop per opcode. The operand letters of each slot are those of fastffn/expr/primitives.py.
#define C(value) static_cast<T>(value)
#define STEP(v0, v1, v2, formula)      \
  [[maybe_unused]] const T v0 = s0[i]; \
  [[maybe_unused]] const T v1 = s1[i]; \
  [[maybe_unused]] const T v2 = s2[i]; \
  out[i] = formula;
#define LOOP(name, v0, v1, v2, formula)                                                            \
  static void name(T* out, const T* s0, const T* s1, const T* s2, int64_t n) {                     \
    const int64_t strips = n & -kStrip, end = n & -kLanes;                                         \
    for (int64_t at = 0; at < strips; at += kStrip) {                                              \
      _Pragma("omp simd") for (int64_t i = at; i < at + kStrip; ++i) { STEP(v0, v1, v2, formula) } \
    }                                                                                              \
    _Pragma("omp simd") for (int64_t i = strips; i < end; ++i) { STEP(v0, v1, v2, formula) }       \
  }
template <class T>
struct Loops {
#define BINARY(name, y_, ga_, gb_) \
  LOOP(name##_y, a, b, unused, y_) \
  LOOP(name##_da, g, a, b, ga_)    \
  LOOP(name##_db, g, a, b, gb_)
#define UNARY(name, y_, ga_)              \
  LOOP(name##_y, a, unused0, unused1, y_) \
  LOOP(name##_da, g, a, y, ga_)
#define GATED(name, t_, y_, ga_)          \
  LOOP(name##_t, a, unused0, unused1, t_) \
  LOOP(name##_y, a, t, unused, y_)        \
  LOOP(name##_da, g, a, t, ga_)           \
  static T name##_of(T a) {               \
    const T t = t_;                       \
    return y_;                            \
  }                                       \
  LOOP(name##_ty, a, unused0, unused1, name##_of(a))
#define FUSED(name, y_) LOOP(name##_y, a, b, c, y_)
#include "../primitives.def"
#undef BINARY
#undef UNARY
#undef GATED
#undef FUSED

  // By opcode: four slots a primitive.
  static constexpr Loop<T> table[] = {
#define BINARY(name, ...) nullptr, name##_y, name##_da, name##_db,
#define UNARY(name, ...) nullptr, name##_y, name##_da, nullptr,
#define GATED(name, ...) name##_t, name##_y, name##_da, name##_ty,
#define FUSED(name, ...) nullptr, name##_y, nullptr, nullptr,
#include "../primitives.def"
#undef BINARY
#undef UNARY
#undef GATED
#undef FUSED
  };
};
#undef LOOP
#undef STEP
#undef C

}  // namespace

namespace fastffn::FASTFFN_ISA {

template <>
const Loop<float>* loops<float>() {
  return Loops<float>::table;
}

template <>
const Loop<double>* loops<double>() {
  return Loops<double>::table;
}

}  // namespace fastffn::FASTFFN_ISA
