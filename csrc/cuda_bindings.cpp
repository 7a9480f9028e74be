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

// `routine` and `registers`: see DeviceRoutine; 0 for the program itself.
void summed_elementwise(const Program& program, int64_t rows, int64_t columns,
                        const std::vector<MatrixTuple>& operands, uintptr_t sums, int64_t chunk,
                        const std::vector<int>& summed, int device, uintptr_t stream,
                        uintptr_t routine, int registers) {
  SummedElementwise call{};
  if (!make_summed_elementwise(program, rows, columns, operands, sums, chunk, summed, call)) return;
  py::gil_scoped_release release;
  cuda_summed_elementwise(call, {routine, registers}, {device, stream});
}

void residual_norm(const Program& program, int64_t rows, int64_t columns,
                   const std::vector<MatrixTuple>& inputs, const MatrixTuple& residual,
                   const MatrixTuple& weight, const MatrixTuple& bias, double eps,
                   uint32_t threshold, uintptr_t seed, const MatrixTuple& mean,
                   const MatrixTuple& rstd, const MatrixTuple& y, int64_t first_row, int device,
                   uintptr_t stream) {
  ResidualNormForward call{};
  if (!make_residual_norm({&program, rows, columns, inputs, residual, weight, bias, eps, threshold,
                           seed, mean, rstd},
                          y, call))
    return;
  call.dropout.first_row = first_row;
  py::gil_scoped_release release;
  cuda_residual_norm(call, {device, stream});
}

void residual_norm_backward(const Program& program, int64_t rows, int64_t columns,
                            const std::vector<MatrixTuple>& inputs, const MatrixTuple& residual,
                            const MatrixTuple& weight, const MatrixTuple& bias, double eps,
                            uint32_t threshold, uintptr_t seed, const MatrixTuple& mean,
                            const MatrixTuple& rstd, const MatrixTuple& dy, const Program& gradient,
                            const std::vector<MatrixTuple>& gradients, const MatrixTuple& dresidual,
                            int added_to, uintptr_t sums, int64_t chunk,
                            const std::vector<int>& summed, int64_t first_row, int device,
                            uintptr_t stream) {
  ResidualNormBackward call{};
  if (!make_residual_norm_backward(
          {&program, rows, columns, inputs, residual, weight, bias, eps, threshold, seed, mean,
           rstd},
          {dy, &gradient, gradients, dresidual, added_to, sums, chunk, summed}, call))
    return;
  call.dropout.first_row = first_row;
  py::gil_scoped_release release;
  cuda_residual_norm_backward(call, {device, stream});
}

py::bytes routine(const Program& program, int registers, int64_t width) {
  return cuda_routine(program.code(), registers, width);
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_elementwise", &elementwise);
  m.def("cuda_summed_elementwise", &summed_elementwise, py::arg(), py::arg(), py::arg(), py::arg(),
        py::arg(), py::arg(), py::arg(), py::arg("device"), py::arg("stream"),
        py::arg("routine") = 0, py::arg("registers") = 0);
  m.def("cuda_residual_norm", &residual_norm);
  m.def("cuda_residual_norm_backward", &residual_norm_backward);
  m.def("cuda_routine", &routine, py::arg("program"), py::arg("registers"), py::arg("width") = -1,
        "Bytes that cuda_summed_elementwise runs from device memory.");
}

}  // namespace fastffn

#endif  // FASTFFN_CUDA
