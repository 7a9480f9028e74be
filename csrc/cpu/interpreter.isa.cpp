// The interpreter of Programs, compiled once per instruction set (FASTFFN_ISA).
//
// It walks blocks of a few hundred elements: every register of the block stays in L1, and each
// instruction is one vectorised loop over the block, so that decoding costs nothing and memory is
// read and written once however long the program. Operands that are dense in the compute type are
// used where they lie; the others are widened into a register and narrowed from one. Loops run to a
// multiple of kLanes; a shorter rest goes through registers whose padding is computed and dropped.
//
// Why not generated code: a search meets a new program every few seconds, and a compiler takes
// seconds for each.

#include <omp.h>

#include <cstring>

#include "block.h"
#include "dispatch.h"

namespace {

using fastffn::Elementwise;
using fastffn::Operand;

// From this many instructions on the next block is prefetched, an operand an instruction: so long a
// block leaves the hardware's prefetchers behind (1.5 times slower without it from 9 instructions
// on, no faster with it up to 7).
constexpr int kLongProgram = 8;
constexpr int64_t kLine = 64;

// How the iteration space falls into blocks: the innermost dimension is cut, the others are counted
// through.
struct Blocks {
  int64_t length;   // elements of a block, a multiple of kLanes
  int64_t per_row;  // blocks along the innermost dimension
  int64_t rows;     // product of the other dimensions

  template <class T>
  static Blocks of(const Elementwise& call) {
    const int64_t columns = call.size[call.dims - 1];
    const int64_t length = block_length<T>(*call.code, columns);
    int64_t rows = 1;
    for (int d = 0; d + 1 < call.dims; ++d) rows *= call.size[d];
    return {length, (columns + length - 1) / length, rows};
  }
};

// One thread's registers, and the walk of its share of the blocks.
template <class T>
class Worker {
 public:
  Worker(const Elementwise& call, const Blocks& blocks, T* memory)
      : call_(call), code_(*call.code), blocks_(blocks), inner_(call.dims - 1) {
    for (int r = 0; r < code_.registers; ++r) home_[r] = memory + r * blocks.length;
    for (int k = 0; k < call.count(); ++k) {
      const Operand& operand = call.operands[k];
      dense_[k] = operand.dtype == kNative<T> && operand.stride[inner_] == 1;
    }
    // An output is computed in place only if its register is its own.
    for (int k = 0; k < code_.outputs; ++k) {
      bool own = code_.results[k] >= code_.inputs;
      for (int other = 0; other < code_.outputs; ++other)
        own &= other == k || code_.results[other] != code_.results[k];
      dense_[code_.inputs + k] &= own;
    }
  }

  void run(int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t column = block % blocks_.per_row * blocks_.length;
      const int64_t rest = call_.size[inner_] - column;
      run_block(block / blocks_.per_row, column, rest < blocks_.length ? rest : blocks_.length);
    }
  }

 private:
  void run_block(int64_t row, int64_t column, int64_t n) {
    int64_t offset[fastffn::kMaxOperands];
    for (int k = 0; k < call_.count(); ++k) offset[k] = column * call_.operands[k].stride[inner_];
    for (int d = inner_ - 1; d >= 0; --d) {
      const int64_t index = row % call_.size[d];
      row /= call_.size[d];
      for (int k = 0; k < call_.count(); ++k) offset[k] += index * call_.operands[k].stride[d];
    }

    T* reg[fastffn::kMaxRegisters];
    std::memcpy(reg, home_, sizeof(T*) * code_.registers);
    const int64_t whole = padded(n);
    T* in_place[fastffn::kMaxOperands];  // operands that are used where they lie, else null
    for (int k = 0; k < call_.count(); ++k) {
      const Operand& operand = call_.operands[k];
      const bool input = k < code_.inputs;
      in_place[k] =
          n == whole && dense_[k] ? reinterpret_cast<T*>(operand.data) + offset[k] : nullptr;
      T*& home = reg[input ? k : code_.results[k - code_.inputs]];
      if (in_place[k]) {
        home = in_place[k];  // an input's register is only read
      } else if (input) {
        load(home, operand.data, operand.dtype, offset[k], operand.stride[inner_], n);
        for (int64_t j = n; j < whole; ++j) home[j] = T(0);  // computed too, and dropped
      }
    }
    const int prefetched = code_.length >= kLongProgram ? call_.count() : 0;
    for (int i = 0; i < code_.length; ++i) {
      const Instruction& at = code_.instructions[i];
      if (i < prefetched && in_place[i]) {
        for (int64_t j = n; j < 2 * n; j += kLine / sizeof(T)) __builtin_prefetch(in_place[i] + j);
      }
      loops_[at.opcode](reg[at.target], reg[at.source[0]], reg[at.source[1]], reg[at.source[2]],
                        whole);
    }
    for (int k = 0; k < code_.outputs; ++k) {
      const int operand = code_.inputs + k;
      if (in_place[operand]) continue;
      const Operand& to = call_.operands[operand];
      store(reg[code_.results[k]], to.data, to.dtype, offset[operand], to.stride[inner_], n);
    }
  }

  const Elementwise& call_;
  const Code& code_;
  const Blocks& blocks_;
  const int inner_;
  const fastffn::FASTFFN_ISA::Loop<T>* const loops_ = fastffn::FASTFFN_ISA::loops<T>();
  T* home_[fastffn::kMaxRegisters];
  bool dense_[fastffn::kMaxOperands];
};

template <class T>
void run(const Elementwise& call) {
  const Blocks blocks = Blocks::of<T>(call);
  const int64_t total = blocks.rows * blocks.per_row;
  const bool serial = blocks.rows * call.size[call.dims - 1] < kSerialElements;
#pragma omp parallel if (!serial)
  {
    const int64_t bytes = call.code->registers * blocks.length * static_cast<int64_t>(sizeof(T));
    char* raw = static_cast<char*>(__builtin_alloca(bytes + 63));
    T* memory = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(raw) + 63) & ~uintptr_t{63});
    Worker<T> worker(call, blocks, memory);
    const int threads = omp_get_num_threads(), thread = omp_get_thread_num();
    worker.run(total * thread / threads, total * (thread + 1) / threads);
  }
}

void elementwise(const Elementwise& call) {
  call.in_double() ? run<double>(call) : run<float>(call);
}

template <float (*f)(float)>
bool apply_all(const float* from, float* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = f(from[i]);
  return true;
}

bool function(const char* name, const float* from, float* to, int64_t n) {
  const auto is = [name](const char* other) { return std::strcmp(name, other) == 0; };
  if (is("exp")) return apply_all<exp>(from, to, n);
  if (is("expm1")) return apply_all<expm1>(from, to, n);
  if (is("tanh")) return apply_all<tanh>(from, to, n);
  if (is("erf")) return apply_all<erf>(from, to, n);
  if (is("sigmoid")) return apply_all<sigmoid>(from, to, n);
  return false;
}

}  // namespace

namespace fastffn::FASTFFN_ISA {

const Variant variant = {elementwise, summed_elementwise, residual_norm, residual_norm_backward,
                         relation,    attention,          encode,        function};

}  // namespace fastffn::FASTFFN_ISA
