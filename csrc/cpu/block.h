// What the interpreters share: blocks of registers, the loops of the opcodes, and operands of any
// storage format. Included only by *.isa.cpp, which is compiled once per instruction set:
// everything but `loops` has internal linkage (see math.h).
#pragma once

#include "../attention.h"
#include "../elementwise.h"
#include "../encoder.h"
#include "../relation.h"
#include "../residual_norm.h"
#include "math.h"

namespace fastffn::FASTFFN_ISA {

template <class T>
using Loop = void (*)(T* out, const T* s0, const T* s1, const T* s2, int64_t n);

// By opcode (four slots a primitive, see fastffn/expr/primitives.py); n is a multiple of kLanes.
// From loops.isa.cpp.
template <class T>
const Loop<T>* loops();
template <>
const Loop<float>* loops<float>();
template <>
const Loop<double>* loops<double>();

// Each in the file of its name.
void summed_elementwise(const SummedElementwise& call);
void residual_norm(const ResidualNormForward& call);
void residual_norm_backward(const ResidualNormBackward& call);
void relation(const Relation& call);
void attention(const Attention& call);
void encode(const Encoding& call);

}  // namespace fastffn::FASTFFN_ISA

namespace {

using fastffn::Code;
using fastffn::DType;
using fastffn::Instruction;

constexpr int64_t kLanes = 16;   // loops run to a multiple of it
constexpr int64_t kStrip = 128;  // and unroll this far: exp and tanh of several vectors overlap

// Block lengths. Its registers should stay far below L1, which the operands stream through too: 8
// KiB measured up to 1.6 times faster than 24 KiB on long backward programs. Below 256 elements the
// calls of the loops show. A program of one instruction keeps nothing, so its blocks are long.
constexpr int64_t kRegisterBytes = 8 * 1024;
constexpr int64_t kMinBlock = 256;
constexpr int64_t kMaxBlock = 1024;
constexpr int64_t kLoneBlock = 16 * 1024;

constexpr int64_t kSerialElements = 16 * 1024;  // fewer: waking threads costs more than they save

template <class T>
constexpr DType kNative = sizeof(T) == 4 ? DType::kFloat32 : DType::kFloat64;

constexpr int64_t padded(int64_t n) { return (n + kLanes - 1) & -kLanes; }

// Elements of a block, a multiple of kLanes, so that the blocks of a row of `columns` are even.
template <class T>
inline int64_t block_length(const Code& code, int64_t columns) {
  const int64_t fit = kRegisterBytes / (code.registers * static_cast<int64_t>(sizeof(T))) & -kStrip;
  const int64_t most = code.length == 1  ? kLoneBlock
                       : fit < kMinBlock ? kMinBlock
                       : fit > kMaxBlock ? kMaxBlock
                                         : fit;
  const int64_t per_row = (columns + most - 1) / most;
  const int64_t even = (columns + per_row - 1) / per_row;
  const int64_t step = even > kStrip ? kStrip : kLanes;
  return (even + step - 1) / step * step;
}

template <class T, class S>
void load_as(T* to, const char* data, int64_t offset, int64_t stride, int64_t n) {
  const S* from = reinterpret_cast<const S*>(data) + offset;
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(widen(from[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(widen(from[i * stride]));
  }
}

template <class T, class S>
void store_as(const T* from, char* data, int64_t offset, int64_t stride, int64_t n) {
  S* to = reinterpret_cast<S*>(data) + offset;
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = narrow<S>(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i * stride] = narrow<S>(from[i]);
  }
}

template <class T>
void load(T* to, const char* data, DType dtype, int64_t offset, int64_t stride, int64_t n) {
  switch (dtype) {
    case DType::kFloat32:
      return load_as<T, float>(to, data, offset, stride, n);
    case DType::kFloat64:
      return load_as<T, double>(to, data, offset, stride, n);
    case DType::kBFloat16:
      return load_as<T, bfloat16>(to, data, offset, stride, n);
    case DType::kFloat16:
      return load_as<T, float16>(to, data, offset, stride, n);
  }
}

template <class T>
void store(const T* from, char* data, DType dtype, int64_t offset, int64_t stride, int64_t n) {
  switch (dtype) {
    case DType::kFloat32:
      return store_as<T, float>(from, data, offset, stride, n);
    case DType::kFloat64:
      return store_as<T, double>(from, data, offset, stride, n);
    case DType::kBFloat16:
      return store_as<T, bfloat16>(from, data, offset, stride, n);
    case DType::kFloat16:
      return store_as<T, float16>(from, data, offset, stride, n);
  }
}

}  // namespace
