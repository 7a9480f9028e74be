#include "bindings.h"

#include <algorithm>
#include <stdexcept>

namespace fastffn {
namespace {

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

DType dtype_of(int number) {
  require(number >= 0 && number <= 3, "unknown dtype");
  return static_cast<DType>(number);
}

Tokens tokens(const TokensTuple& tuple) {
  const auto& [address, dtype, batch, row, column] = tuple;
  return {reinterpret_cast<char*>(address), dtype_of(dtype), batch, row, column};
}

Matrix matrix(const MatrixTuple& tuple) {
  const auto& [address, dtype, row, column] = tuple;
  return {reinterpret_cast<char*>(address), dtype_of(dtype), row, column};
}

void check_program(const Code& code) {
  require(code.inputs + code.outputs <= kMaxOperands, "more than 16 operands");
  require(code.registers <= kMaxRegisters, "more than 256 registers");
}

void check_size(int64_t rows, int64_t columns) {
  require(rows >= 0 && columns >= 0, "a negative size");
}

void fill_summed(const std::vector<int>& summed, const Code& code, int* into, int& count) {
  require(summed.size() <= static_cast<size_t>(code.outputs), "more sums than outputs");
  count = 0;
  for (const int output : summed) {
    require(output >= 0 && output < code.outputs, "a sum of no output");
    into[count++] = output;
  }
}

void fill(const ResidualNormArguments& from, ResidualNorm& call) {
  call.program = &from.program->code();
  check_program(*call.program);
  check_size(from.rows, from.columns);
  require(call.program->outputs == 1, "residual_norm: the program has one output");
  require(from.inputs.size() == static_cast<size_t>(call.program->inputs),
          "residual_norm: input count");
  require(from.threshold < 65536, "residual_norm: a threshold beyond 16 bits");
  require(from.threshold == 0 || from.seed != 0, "residual_norm: dropout without a seed");
  call.rows = from.rows;
  call.columns = from.columns;
  for (size_t k = 0; k < from.inputs.size(); ++k) call.inputs[k] = matrix(from.inputs[k]);
  call.residual = matrix(from.residual);
  call.weight = matrix(from.weight);
  call.bias = matrix(from.bias);
  call.eps = from.eps;
  call.dropout = {from.threshold, reinterpret_cast<const uint64_t*>(from.seed), 0};
  call.mean = matrix(from.mean);
  call.rstd = matrix(from.rstd);
  const auto is_double = [](const Matrix& m) { return m.data && m.dtype == DType::kFloat64; };
  call.in_double = is_double(call.residual) || is_double(call.weight) || is_double(call.bias) ||
                   std::any_of(call.inputs, call.inputs + from.inputs.size(), is_double);
  // The statistics say so where they are: a backward does not see all operands of the forward.
  if (call.mean.data) call.in_double = is_double(call.mean);
  for (const Matrix* statistic : {&call.mean, &call.rstd}) {
    const DType compute = call.in_double ? DType::kFloat64 : DType::kFloat32;
    require(!statistic->data || statistic->dtype == compute,
            "residual_norm: mean and rstd have the type of the computation");
  }
}

}  // namespace

bool make_elementwise(const Program& program, const std::vector<int64_t>& size,
                      const std::vector<OperandTuple>& operands, Elementwise& call) {
  call.code = &program.code();
  call.dims = static_cast<int>(size.size());
  require(size.size() <= kMaxDims, "elementwise: more than 8 dimensions");
  require(operands.size() == static_cast<size_t>(call.count()), "elementwise: operand count");
  check_program(*call.code);
  for (int d = 0; d < call.dims; ++d) {
    call.size[d] = size[d];
    if (size[d] == 0) return false;
  }
  for (size_t k = 0; k < operands.size(); ++k) {
    const auto& [address, dtype, strides] = operands[k];
    require(strides.size() == size.size(), "elementwise: stride count");
    call.operands[k].data = reinterpret_cast<char*>(address);
    call.operands[k].dtype = dtype_of(dtype);
    for (int d = 0; d < call.dims; ++d) call.operands[k].stride[d] = strides[d];
  }
  call.coalesce();
  return true;
}

bool make_summed_elementwise(const Program& program, int64_t rows, int64_t columns,
                             const std::vector<MatrixTuple>& operands, uintptr_t sums,
                             int64_t chunk, const std::vector<int>& summed,
                             SummedElementwise& call) {
  call.program = &program.code();
  check_program(*call.program);
  check_size(rows, columns);
  require(operands.size() == static_cast<size_t>(call.program->inputs + call.program->outputs),
          "summed_elementwise: operand count");
  require(chunk > 0 && sums != 0, "summed_elementwise: no place for the sums");
  call.rows = rows;
  call.columns = columns;
  for (size_t k = 0; k < operands.size(); ++k) call.operands[k] = matrix(operands[k]);
  call.in_double = std::any_of(call.operands, call.operands + operands.size(),
                               [](const Matrix& m) { return m.dtype == DType::kFloat64; });
  call.sums = reinterpret_cast<char*>(sums);
  call.chunk = chunk;
  fill_summed(summed, *call.program, call.summed, call.summed_count);
  return rows > 0 && columns > 0;
}

bool make_residual_norm(const ResidualNormArguments& arguments, const MatrixTuple& y,
                        ResidualNormForward& call) {
  fill(arguments, call);
  call.y = matrix(y);
  return call.rows > 0 && call.columns > 0;
}

bool make_residual_norm_backward(const ResidualNormArguments& arguments,
                                 const ResidualNormGradients& gradients,
                                 ResidualNormBackward& call) {
  fill(arguments, call);
  call.gradient = &gradients.gradient->code();
  check_program(*call.gradient);
  require(call.gradient->inputs == call.program->inputs + 1,
          "residual_norm_backward: the gradient's inputs");
  require(gradients.gradients.size() == static_cast<size_t>(call.gradient->outputs),
          "residual_norm_backward: gradient count");
  require(call.mean.data && call.rstd.data, "residual_norm_backward: mean and rstd are needed");
  require(gradients.chunk > 0 && gradients.sums != 0,
          "residual_norm_backward: no place for the sums");
  require(gradients.added_to >= -1 && gradients.added_to < call.gradient->outputs,
          "residual_norm_backward: added_to is no output");
  call.dy = matrix(gradients.dy);
  for (size_t k = 0; k < gradients.gradients.size(); ++k)
    call.gradients[k] = matrix(gradients.gradients[k]);
  call.dresidual = matrix(gradients.dresidual);
  call.added_to = gradients.added_to;
  call.sums = reinterpret_cast<char*>(gradients.sums);
  call.chunk = gradients.chunk;
  fill_summed(gradients.summed, *call.gradient, call.summed, call.summed_count);
  return call.rows > 0 && call.columns > 0;
}

void make_relation(const RelationArguments& from, Relation& call) {
  for (const int64_t size : {from.batch, from.length, from.heads, from.width, from.teacher_width})
    require(size >= 0 && size <= INT32_MAX, "relation: a size out of range");
  require(from.divergence >= 0 && from.divergence <= static_cast<int>(Divergence::kScoreMse),
          "relation: unknown divergence");
  call = {
      .batch = from.batch,
      .length = from.length,
      .heads = from.heads,
      .width = from.width,
      .teacher_width = from.teacher_width,
      .a = tokens(from.a),
      .b = tokens(from.b),
      .teacher_a = tokens(from.teacher_a),
      .teacher_b = tokens(from.teacher_b),
      .real = reinterpret_cast<const uint8_t*>(from.real),
      .real_stride = {from.real_stride.first, from.real_stride.second},
      .scale = from.scale,
      .teacher_scale = from.teacher_scale,
      .divergence = static_cast<Divergence>(from.divergence),
      .weights = reinterpret_cast<const char*>(from.weights),
      .weights_stride = {std::get<0>(from.weights_stride), std::get<1>(from.weights_stride),
                         std::get<2>(from.weights_stride)},
      .in_double = from.in_double,
      .rows = reinterpret_cast<char*>(from.rows),
      .loss = reinterpret_cast<char*>(from.loss),
      .da = tokens(from.da),
      .db = tokens(from.db),
  };
  const bool empty = !from.batch || !from.length;  // of an empty tensor the address may be 0
  require(call.weights || empty || !(call.loss || call.da.data || call.db.data),
          "relation: a loss or a gradient without weights");
  require(!call.is_self() || !call.db.data, "relation: two gradients of one operand");
}

}  // namespace fastffn
