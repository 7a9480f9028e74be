// Arguments of the CUDA functions; the kernels are in cuda/. Empty in a build without CUDA.
#ifdef FASTFFN_CUDA

#include "bindings.h"
#include "cuda/bindings.h"
#include "cuda/interpreter.h"
#include "program.h"

namespace py = pybind11;

namespace fastffn {
namespace {

void elementwise(const Program& program, const std::vector<int64_t>& size,
                 const std::vector<OperandTuple>& operands, int device, uintptr_t stream) {
  Elementwise call{};
  if (!make_elementwise(program, size, operands, call)) return;
  py::gil_scoped_release release;
  cuda_elementwise(call, {device, stream});
}

// `routine`, `gradient_routine` and `registers`: see DeviceRoutines; 0 for the programs themselves.
void summed_elementwise(const Program& program, int64_t rows, int64_t columns,
                        const std::vector<MatrixTuple>& operands, uintptr_t sums, int64_t chunk,
                        const std::vector<int>& summed, int device, uintptr_t stream,
                        uintptr_t routine, int registers) {
  SummedElementwise call{};
  if (!make_summed_elementwise(program, rows, columns, operands, sums, chunk, summed, call)) return;
  py::gil_scoped_release release;
  cuda_summed_elementwise(call, {routine, 0, registers}, {device, stream});
}

void residual_norm(const Program& program, int64_t rows, int64_t columns,
                   const std::vector<MatrixTuple>& inputs, const MatrixTuple& residual,
                   const MatrixTuple& weight, const MatrixTuple& bias, double eps,
                   uint32_t threshold, uintptr_t seed, const MatrixTuple& mean,
                   const MatrixTuple& rstd, const MatrixTuple& y, int64_t first_row, int device,
                   uintptr_t stream, uintptr_t routine, int registers) {
  ResidualNormForward call{};
  if (!make_residual_norm({&program, rows, columns, inputs, residual, weight, bias, eps, threshold,
                           seed, mean, rstd},
                          y, call))
    return;
  call.dropout.first_row = first_row;
  py::gil_scoped_release release;
  cuda_residual_norm(call, {routine, 0, registers}, {device, stream});
}

void residual_norm_backward(const Program& program, int64_t rows, int64_t columns,
                            const std::vector<MatrixTuple>& inputs, const MatrixTuple& residual,
                            const MatrixTuple& weight, const MatrixTuple& bias, double eps,
                            uint32_t threshold, uintptr_t seed, const MatrixTuple& mean,
                            const MatrixTuple& rstd, const MatrixTuple& dy, const Program& gradient,
                            const std::vector<MatrixTuple>& gradients, const MatrixTuple& dresidual,
                            int added_to, uintptr_t sums, int64_t chunk,
                            const std::vector<int>& summed, int64_t first_row, int device,
                            uintptr_t stream, uintptr_t routine, uintptr_t gradient_routine,
                            int registers) {
  ResidualNormBackward call{};
  if (!make_residual_norm_backward(
          {&program, rows, columns, inputs, residual, weight, bias, eps, threshold, seed, mean,
           rstd},
          {dy, &gradient, gradients, dresidual, added_to, sums, chunk, summed}, call))
    return;
  call.dropout.first_row = first_row;
  py::gil_scoped_release release;
  cuda_residual_norm_backward(call, {routine, gradient_routine, registers}, {device, stream});
}

py::bytes routine(const Program& program, int registers, int64_t width) {
  return cuda_routine(program.code(), registers, width);
}

}  // namespace

void bind_cuda(py::module_& m) {
  const py::arg device("device"), stream("stream"), program("program"), rows("rows");
  const py::arg columns("columns"), operands("operands"), inputs("inputs"), residual("residual");
  const py::arg weight("weight"), bias("bias"), eps("eps"), threshold("threshold"), seed("seed");
  const py::arg mean("mean"), rstd("rstd"), sums("sums"), chunk("chunk"), summed("summed");
  const py::arg first_row("first_row");
  const py::arg_v routine_0 = py::arg("routine") = 0, registers_0 = py::arg("registers") = 0;
  m.def("cuda_elementwise", &elementwise, program, py::arg("size"), operands, device, stream);
  m.def("cuda_summed_elementwise", &summed_elementwise, program, rows, columns, operands, sums,
        chunk, summed, device, stream, routine_0, registers_0);
  m.def("cuda_residual_norm", &residual_norm, program, rows, columns, inputs, residual, weight,
        bias, eps, threshold, seed, mean, rstd, py::arg("y"), first_row, device, stream, routine_0,
        registers_0);
  m.def("cuda_residual_norm_backward", &residual_norm_backward, program, rows, columns, inputs,
        residual, weight, bias, eps, threshold, seed, mean, rstd, py::arg("dy"),
        py::arg("gradient"), py::arg("gradients"), py::arg("dresidual"), py::arg("added_to"), sums,
        chunk, summed, first_row, device, stream, routine_0, py::arg("gradient_routine") = 0,
        registers_0);
  m.def("cuda_routine", &routine, program, py::arg("registers"), py::arg("width") = -1,
        "Bytes of a program for device memory; the other functions run it instead of their own.");
  m.def(
      "cuda_takes", [](const Program& p) { return cuda_takes(p.code()); }, program,
      "Whether the other functions take a program; they raise RuntimeError for a longer one.");
}

}  // namespace fastffn

#endif  // FASTFFN_CUDA
