// The Python module fastffn._C. Free of torch headers: tensors arrive as addresses, sizes and
// strides, so one build serves every torch.

#include <pybind11/pybind11.h>

#include "attention_bindings.h"
#include "bindings.h"
#include "cpu/dispatch.h"
#ifdef FASTFFN_CUDA
#include "cuda/bindings.h"
#endif
#include "encoder_bindings.h"
#include "program.h"

namespace py = pybind11;

namespace fastffn {
namespace {

void elementwise(const Program& program, const std::vector<int64_t>& size,
                 const std::vector<OperandTuple>& operands) {
  Elementwise call{};
  if (!make_elementwise(program, size, operands, call)) return;
  py::gil_scoped_release release;
  run_elementwise(call);
}

void summed_elementwise(const Program& program, int64_t rows, int64_t columns,
                        const std::vector<MatrixTuple>& operands, uintptr_t sums, int64_t chunk,
                        const std::vector<int>& summed) {
  SummedElementwise call{};
  if (!make_summed_elementwise(program, rows, columns, operands, sums, chunk, summed, call)) return;
  py::gil_scoped_release release;
  run_summed_elementwise(call);
}

void residual_norm(const Program& program, int64_t rows, int64_t columns,
                   const std::vector<MatrixTuple>& inputs, const MatrixTuple& residual,
                   const MatrixTuple& weight, const MatrixTuple& bias, double eps,
                   uint32_t threshold, uintptr_t seed, const MatrixTuple& mean,
                   const MatrixTuple& rstd, const MatrixTuple& y, int64_t first_row) {
  ResidualNormForward call{};
  if (!make_residual_norm({&program, rows, columns, inputs, residual, weight, bias, eps, threshold,
                           seed, mean, rstd},
                          y, call))
    return;
  call.dropout.first_row = first_row;
  py::gil_scoped_release release;
  run_residual_norm(call);
}

void residual_norm_backward(const Program& program, int64_t rows, int64_t columns,
                            const std::vector<MatrixTuple>& inputs, const MatrixTuple& residual,
                            const MatrixTuple& weight, const MatrixTuple& bias, double eps,
                            uint32_t threshold, uintptr_t seed, const MatrixTuple& mean,
                            const MatrixTuple& rstd, const MatrixTuple& dy, const Program& gradient,
                            const std::vector<MatrixTuple>& gradients, const MatrixTuple& dresidual,
                            int added_to, uintptr_t sums, int64_t chunk,
                            const std::vector<int>& summed, int64_t first_row) {
  ResidualNormBackward call{};
  if (!make_residual_norm_backward(
          {&program, rows, columns, inputs, residual, weight, bias, eps, threshold, seed, mean,
           rstd},
          {dy, &gradient, gradients, dresidual, added_to, sums, chunk, summed}, call))
    return;
  call.dropout.first_row = first_row;
  py::gil_scoped_release release;
  run_residual_norm_backward(call);
}

void relation(int64_t batch, int64_t length, int64_t heads, int64_t width, int64_t teacher_width,
              const TokensTuple& a, const TokensTuple& b, const TokensTuple& teacher_a,
              const TokensTuple& teacher_b, uintptr_t real,
              const std::pair<int64_t, int64_t>& real_stride, double scale, double teacher_scale,
              int divergence, uintptr_t weights,
              const std::tuple<int64_t, int64_t, int64_t>& weights_stride, bool in_double,
              uintptr_t rows, uintptr_t loss, const TokensTuple& da, const TokensTuple& db) {
  Relation call{};
  make_relation({batch,
                 length,
                 heads,
                 width,
                 teacher_width,
                 a,
                 b,
                 teacher_a,
                 teacher_b,
                 real,
                 real_stride,
                 scale,
                 teacher_scale,
                 divergence,
                 weights,
                 weights_stride,
                 in_double,
                 rows,
                 loss,
                 da,
                 db},
                call);
  py::gil_scoped_release release;
  run_relation(call);
}

}  // namespace
}  // namespace fastffn

PYBIND11_MODULE(_C, m) {
  using namespace fastffn;
  m.doc() = "fastffn's C++ interpreters; see csrc/.";
  py::class_<Program>(m, "Program").def(py::init([](const py::bytes& packed) {
    return std::make_unique<Program>(std::string_view(packed));
  }));
  m.def("elementwise", &elementwise, py::arg("program"), py::arg("size"), py::arg("operands"));
  m.def("summed_elementwise", &summed_elementwise);
  m.def("residual_norm", &residual_norm);
  m.def("residual_norm_backward", &residual_norm_backward);
  m.def("relation", &relation);
  bind_attention(m);
  bind_encoder(m);
#ifdef FASTFFN_CUDA
  bind_cuda(m);
#endif
  m.def("function", [](const std::string& name, uintptr_t from, uintptr_t to, int64_t n) {
    run_function(name, reinterpret_cast<const float*>(from), reinterpret_cast<float*>(to), n);
  });
  m.attr("MAX_DIMS") = kMaxDims;
  m.attr("MAX_OPERANDS") = kMaxOperands;
  m.attr("MAX_REGISTERS") = kMaxRegisters;
  m.def("isa", &active_isa, "Instruction set in use.");
  m.def("available_isas", &runnable_isas,
        "Instruction sets of this build that run here, best first.");
  m.def(
      "select_isa", [](const std::string& name) { select_isa(name); },
      "Use this instruction set from now on.");
}
