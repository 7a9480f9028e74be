// How Python's tuples become calls; shared by the CPU and the CUDA functions of the module. Checked
// here is what would otherwise be undefined behaviour whatever the caller does; fastffn/ops checks
// shapes, types and devices.
#pragma once

#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "elementwise.h"
#include "relation.h"
#include "residual_norm.h"

namespace fastffn {

// (address, dtype, strides in elements).
using OperandTuple = std::tuple<uintptr_t, int, std::vector<int64_t>>;
// (address, dtype, row stride, column stride); address 0: absent.
using MatrixTuple = std::tuple<uintptr_t, int, int64_t, int64_t>;

// Operands: inputs, then outputs. False if there is nothing to compute.
// Throws std::invalid_argument.
bool make_elementwise(const Program& program, const std::vector<int64_t>& size,
                      const std::vector<OperandTuple>& operands, Elementwise& call);

bool make_summed_elementwise(const Program& program, int64_t rows, int64_t columns,
                             const std::vector<MatrixTuple>& operands, uintptr_t sums,
                             int64_t chunk, const std::vector<int>& summed,
                             SummedElementwise& call);

// What the row kernel's forward and backward take in common.
struct ResidualNormArguments {
  const Program* program;
  int64_t rows, columns;
  std::vector<MatrixTuple> inputs;
  MatrixTuple residual, weight, bias;
  double eps;
  uint32_t threshold;
  uintptr_t seed;
  MatrixTuple mean, rstd;
};

bool make_residual_norm(const ResidualNormArguments& arguments, const MatrixTuple& y,
                        ResidualNormForward& call);

struct ResidualNormGradients {
  MatrixTuple dy;
  const Program* gradient;
  std::vector<MatrixTuple> gradients;
  MatrixTuple dresidual;
  int added_to;
  uintptr_t sums;
  int64_t chunk;
  std::vector<int> summed;
};

bool make_residual_norm_backward(const ResidualNormArguments& arguments,
                                 const ResidualNormGradients& gradients,
                                 ResidualNormBackward& call);

// (address, dtype, strides of batch, row and column); address 0: absent.
using TokensTuple = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t>;

struct RelationArguments {
  int64_t batch, length, heads, width, teacher_width;
  TokensTuple a, b, teacher_a, teacher_b;
  uintptr_t real;
  std::pair<int64_t, int64_t> real_stride;
  double scale, teacher_scale;
  int divergence;
  uintptr_t weights;
  std::tuple<int64_t, int64_t, int64_t> weights_stride;
  bool in_double;
  uintptr_t rows, loss;
  TokensTuple da, db;
};

void make_relation(const RelationArguments& arguments, Relation& call);

}  // namespace fastffn
