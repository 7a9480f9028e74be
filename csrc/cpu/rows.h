// A Program over the rows of matrices, for the kernels that need a whole row at a time. Included
// only by *.isa.cpp, as block.h.
#pragma once

#include "arena.h"
#include "block.h"

namespace {

using fastffn::Matrix;

// Whether `whole` elements from `offset` on may be read where they lie, although only part of them
// belong to the row: the rest must still be inside the matrix. What is computed from it is dropped.
template <class T>
bool readable(const Matrix& from, int64_t rows, int64_t columns, int64_t offset, int64_t whole) {
  return from.dtype == kNative<T> && from.column == 1 && from.row >= 0 &&
         offset + whole <= (rows - 1) * from.row + columns;
}

// The n elements of a row as T: where they lie, or copied into `buffer`, with zeros up to a
// multiple of kLanes.
template <class T>
const T* read_row(const Matrix& from, int64_t rows, int64_t columns, int64_t row, int64_t column,
                  int64_t n, T* buffer) {
  const int64_t offset = row * from.row + column * from.column, whole = padded(n);
  if (readable<T>(from, rows, columns, offset, whole))
    return reinterpret_cast<const T*>(from.data) + offset;
  load(buffer, from.data, from.dtype, offset, from.column, n);
  for (int64_t i = n; i < whole; ++i) buffer[i] = T(0);
  return buffer;
}

template <class T>
void write_row(const T* values, const Matrix& to, int64_t row, int64_t column, int64_t n) {
  store(values, to.data, to.dtype, row * to.row + column * to.column, to.column, n);
}

// One thread's registers for a Program over matrices of `columns`.
template <class T>
class RowProgram {
 public:
  // Elements of the memory that the constructor takes.
  static int64_t memory_size(const Code& code, int64_t columns) {
    return code.registers * block_length<T>(code, columns);
  }

  RowProgram(const Code& code, const Matrix* inputs, int64_t rows, int64_t columns, T* memory)
      : length(block_length<T>(code, columns)),
        code_(code),
        inputs_(inputs),
        rows_(rows),
        columns_(columns),
        memory_(memory),
        loops_(fastffn::FASTFFN_ISA::loops<T>()) {}

  // Computes columns [column, column + n) of a row, n at most `length`. `given`, if not null,
  // is the first input, and the matrices are the others: n elements, readable up to a multiple of
  // kLanes.
  void run(int64_t row, int64_t column, int64_t n, const T* given = nullptr) {
    // An input's register is only read.
    if (given) reg_[0] = const_cast<T*>(given);
    for (int k = given ? 1 : 0; k < code_.inputs; ++k) {
      const Matrix& input = inputs_[given ? k - 1 : k];
      reg_[k] =
          const_cast<T*>(read_row(input, rows_, columns_, row, column, n, memory_ + k * length));
    }
    for (int r = code_.inputs; r < code_.registers; ++r) reg_[r] = memory_ + r * length;
    const int64_t whole = padded(n);
    for (int i = 0; i < code_.length; ++i) {
      const Instruction& at = code_.instructions[i];
      loops_[at.opcode](reg_[at.target], reg_[at.source[0]], reg_[at.source[1]], reg_[at.source[2]],
                        whole);
    }
  }

  // Output k of the last run: readable, not writable, since it may be an input.
  const T* result(int k) const { return reg_[code_.results[k]]; }

  const int64_t length;  // of a block of columns

 private:
  const Code& code_;
  const Matrix* inputs_;
  const int64_t rows_, columns_;
  T* const memory_;
  const fastffn::FASTFFN_ISA::Loop<T>* const loops_;
  T* reg_[fastffn::kMaxRegisters];
};

// Half a row at a time into sums of their own: one accumulator would wait for each addition.
template <class T, class F>
T sum_of(int64_t n, F term) {
  const int64_t half = n / 2 & -kLanes;
  T low = 0, high = 0, rest = 0;
#pragma omp simd reduction(+ : low, high)
  for (int64_t i = 0; i < half; ++i) {
    low += term(i);
    high += term(half + i);
  }
#pragma omp simd reduction(+ : rest)
  for (int64_t i = 2 * half; i < n; ++i) rest += term(i);
  return low + high + rest;
}

template <class T>
void add_to(T* sums, const T* values, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sums[i] += values[i];
}

}  // namespace
