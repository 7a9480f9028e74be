// The functions of csrc/cuda_bindings.cpp, on the memory of the CPU. One source with those that
// include pybind11, which is most of what the compiler has to read.

#include <pybind11/pybind11.h>

#include "bindings.cpp"
#include "cuda_bindings.cpp"
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
