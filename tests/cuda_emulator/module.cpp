// The functions of csrc/cuda_bindings.cpp, on the memory of the CPU.

#include <pybind11/pybind11.h>

#include "cuda/bindings.h"
#include "emulator.h"
#include "program.h"

namespace py = pybind11;

PYBIND11_MODULE(cuda_emulated, m) {
  using fastffn::Program;
  py::class_<Program>(m, "Program", py::module_local()).def(py::init([](const py::bytes& packed) {
    return std::make_unique<Program>(std::string_view(packed));
  }));
  fastffn::bind_cuda(m);
  m.def("set_reverse_order", &emulator::set_reverse_order);
}
