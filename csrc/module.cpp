// The Python module fastffn._C. Free of torch headers: tensors arrive as addresses, sizes and
// strides, so one build serves every torch. The callers in fastffn/ops check shapes, types and
// devices; what is checked here is what would otherwise be undefined behaviour whatever the caller
// does.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "cpu/interpreter.h"
#include "elementwise.h"
#include "program.h"

namespace py = pybind11;

namespace fastffn {
namespace {

// Operands: inputs, then outputs, each (address, dtype, strides in elements).
using OperandTuple = std::tuple<uintptr_t, int, std::vector<int64_t>>;

void elementwise(const Program& program, const std::vector<int64_t>& size,
                 const std::vector<OperandTuple>& operands) {
  Elementwise call{};
  call.code = &program.code();
  call.dims = static_cast<int>(size.size());
  if (size.size() > kMaxDims) throw std::invalid_argument("elementwise: more than 8 dimensions");
  if (operands.size() != static_cast<size_t>(call.count()))
    throw std::invalid_argument("elementwise: operand count");
  if (operands.size() > kMaxOperands)
    throw std::invalid_argument("elementwise: more than 16 operands");
  if (call.code->registers > kMaxRegisters)
    throw std::invalid_argument("elementwise: more than 256 registers");
  for (int d = 0; d < call.dims; ++d) {
    call.size[d] = size[d];
    if (size[d] == 0) return;
  }
  for (size_t k = 0; k < operands.size(); ++k) {
    const auto& [address, dtype, strides] = operands[k];
    if (strides.size() != size.size()) throw std::invalid_argument("elementwise: stride count");
    if (dtype < 0 || dtype > 3) throw std::invalid_argument("elementwise: unknown dtype");
    call.operands[k].data = reinterpret_cast<char*>(address);
    call.operands[k].dtype = static_cast<DType>(dtype);
    for (int d = 0; d < call.dims; ++d) call.operands[k].stride[d] = strides[d];
  }
  py::gil_scoped_release release;
  call.coalesce();
  run_elementwise(call);
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
