// The CUDA functions of the Python module: those of the CPU, with (device, stream) after their
// arguments.
#pragma once

#include <pybind11/pybind11.h>

namespace fastffn {

void bind_cuda(pybind11::module_& m);

}  // namespace fastffn
