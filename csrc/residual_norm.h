// One call of the row kernel: program, dropout, residual and LayerNorm in one pass over the rows,
// forward and backward.
//
//   e = program(inputs)                         elementwise
//   s = residual + dropout(e)
//   y = (s - mean(s)) * rstd(s) * weight + bias         over the columns of a row
//
// The computation is in float, or in double if an operand is double. Tensors are [rows, columns]
// with any strides (0 repeats a row or column vector); weight and bias are row vectors.
#pragma once

#include <cstdint>

#include "elementwise.h"
#include "random.h"

namespace fastffn {

// A 2-D operand. Strides are in elements. data null: absent.
struct Matrix {
  char* data;
  DType dtype;
  int64_t row;
  int64_t column;
};

struct ResidualNorm {
  const Code* program;  // one output
  int64_t rows;
  int64_t columns;
  Matrix inputs[kMaxOperands];  // of the program
  Matrix residual;
  Matrix weight;  // absent: 1
  Matrix bias;    // absent: 0
  double eps;
  Dropout dropout;
  Matrix mean;  // column vectors in the compute type: written by the forward, read by the backward
  Matrix rstd;
  bool in_double;  // the compute type
};

struct ResidualNormForward : ResidualNorm {
  Matrix y;
};

// Gradients from dy. s and e are computed again from the same inputs.
struct ResidualNormBackward : ResidualNorm {
  Matrix dy;
  const Code* gradient;            // inputs: the gradient of e, then the program's inputs
  Matrix gradients[kMaxOperands];  // the outputs of `gradient`
  Matrix dresidual;                // absent if added_to is an output
  int added_to;  // output of `gradient` that the residual's gradient is added to (the program reads
                 // the residual too), or -1

  // Column sums, in the compute type: [chunks, sums, columns] contiguous, one partial sum per
  // `chunk` rows, to be added up by the caller, so that the result does not depend on the threads.
  // In order: the gradient of weight, of bias, then the outputs of `gradient` in `summed`.
  char* sums;
  int64_t chunk;
  int summed_count;
  int summed[kMaxOperands];
};

// A Program over [rows, columns] that also adds up columns of some outputs, as bias gradients are.
struct SummedElementwise {
  const Code* program;
  int64_t rows;
  int64_t columns;
  Matrix operands[kMaxOperands];  // inputs, then outputs
  bool in_double;
  char* sums;  // as above: [chunks, summed_count, columns]
  int64_t chunk;
  int summed_count;
  int summed[kMaxOperands];  // positions among the outputs
};

}  // namespace fastffn
