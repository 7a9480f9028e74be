// A Program over matrices that adds up the columns of some outputs on the way: the backward of a
// segment with its bias gradients in one pass. Compiled once per instruction set.

#include <omp.h>

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "rows.h"

namespace {

using fastffn::SummedElementwise;

template <class T>
void run(const SummedElementwise& call) {
  const Code& code = *call.program;
  const int64_t chunks = (call.rows + call.chunk - 1) / call.chunk;
#pragma omp parallel if (call.rows * call.columns >= kSerialElements)
  {
    std::vector<T> memory(RowProgram<T>::memory_size(code, call.columns) + 64 / sizeof(T));
    T* aligned =
        reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t{63});
    RowProgram<T> program(code, call.operands, call.rows, call.columns, aligned);
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      T* sums = reinterpret_cast<T*>(call.sums) + chunk * call.summed_count * call.columns;
      std::fill_n(sums, call.summed_count * call.columns, T(0));
      const int64_t last = std::min(call.rows, (chunk + 1) * call.chunk);
      for (int64_t row = chunk * call.chunk; row < last; ++row) {
        for (int64_t column = 0; column < call.columns; column += program.length) {
          const int64_t n = std::min(program.length, call.columns - column);
          program.run(row, column, n);
          for (int s = 0; s < call.summed_count; ++s)
            add_to(sums + s * call.columns + column, program.result(call.summed[s]), n);
          for (int k = 0; k < code.outputs; ++k)
            write_row(program.result(k), call.operands[code.inputs + k], row, column, n);
        }
      }
    }
  }
}

}  // namespace

namespace fastffn::FASTFFN_ISA {

void summed_elementwise(const SummedElementwise& call) {
  call.in_double ? run<double>(call) : run<float>(call);
}

}  // namespace fastffn::FASTFFN_ISA
