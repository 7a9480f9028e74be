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

}  // namespace

void bind_cuda(py::module_& m) { m.def("cuda_elementwise", &elementwise); }

}  // namespace fastffn

#endif  // FASTFFN_CUDA
