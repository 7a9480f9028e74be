#include "attention_bindings.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "attention.h"
#include "cpu/dispatch.h"

namespace fastffn {
namespace {

namespace py = pybind11;

// (address, elements from a row to the next)
using RowsTuple = std::tuple<uintptr_t, int64_t>;

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument("attention: " + message);
}

HeadRows head_rows(const RowsTuple& tuple) {
  return {reinterpret_cast<char*>(std::get<0>(tuple)), std::get<1>(tuple)};
}

// starts and bias by address; bias 0: none, `longest` the length that it has room for.
void attention(int dtype, const RowsTuple& query, const RowsTuple& key, const RowsTuple& value,
               const RowsTuple& out, int64_t tokens, int64_t heads, int64_t head_size,
               uintptr_t starts, int64_t sequences, double scale, uintptr_t bias,
               const std::tuple<int64_t, int64_t>& bias_stride, int64_t longest) {
  Attention call{};
  call.dtype = static_cast<DType>(dtype);
  require(call.dtype == DType::kFloat32 || call.dtype == DType::kBFloat16,
          "float32 or bfloat16, nothing else");
  require(heads >= 0 && head_size > 0 && head_size <= kMaxHeadSize, "head size out of range");
  call.query = head_rows(query);
  call.key = head_rows(key);
  call.value = head_rows(value);
  call.out = head_rows(out);
  call.heads = heads;
  call.head_size = head_size;
  call.starts = reinterpret_cast<const int64_t*>(starts);
  call.sequences = sequences;
  call.scale = static_cast<float>(scale);
  call.bias = reinterpret_cast<const float*>(bias);
  call.bias_stride[0] = std::get<0>(bias_stride);
  call.bias_stride[1] = std::get<1>(bias_stride);
  // Addresses are made of these: none may lie outside.
  require(sequences >= 0 && call.starts[0] == 0 && call.starts[sequences] == tokens,
          "starts rise from 0 to the number of tokens, " + std::to_string(tokens));
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t length = call.starts[s + 1] - call.starts[s];
    require(length >= 0, "starts fall at sequence " + std::to_string(s));
    require(!call.bias || length <= longest, "a bias of length " + std::to_string(longest) +
                                                 " and a sequence of " + std::to_string(length));
  }
  py::gil_scoped_release release;
  run_attention(call);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention", &attention);
  m.attr("MAX_HEAD_SIZE") = kMaxHeadSize;
}

}  // namespace fastffn
