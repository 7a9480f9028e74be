// One elementwise call as the interpreters see it: a Program over a few strided operands.
#pragma once

#include <cstdint>

#include "program.h"

namespace fastffn {

enum class DType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

constexpr int kMaxDims = 8;
constexpr int kMaxOperands = 16;
constexpr int kMaxRegisters = 256;

// One input or output. Strides are in elements, outermost dimension first; 0 repeats the operand.
struct Operand {
  char* data;
  DType dtype;
  int64_t stride[kMaxDims];
};

// `operands` holds the inputs, then the outputs, over an iteration space of `dims` sizes. The
// computation is in double if an operand is, else in float.
struct Elementwise {
  const Code* code;
  int dims;
  int64_t size[kMaxDims];
  Operand operands[kMaxOperands];

  int count() const { return code->inputs + code->outputs; }
  bool in_double() const;

  // Puts the dimensions into the order of the first output's memory and merges those that every
  // operand walks as one, so that the innermost is as long as can be. The call computes the same.
  void coalesce();
};

}  // namespace fastffn
