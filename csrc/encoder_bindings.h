// The class Encoder of the module: packed from a model's weights, run over rows without padding.
#pragma once

#include <pybind11/pybind11.h>

namespace fastffn {

void bind_encoder(pybind11::module_& m);

}  // namespace fastffn
