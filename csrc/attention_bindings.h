// The attention kernel as a function of Python's.
#pragma once

#include <pybind11/pybind11.h>

namespace fastffn {

void bind_attention(pybind11::module_& m);

}  // namespace fastffn
