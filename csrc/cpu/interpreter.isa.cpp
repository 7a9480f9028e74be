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

#include "interpreter.h"

#include <omp.h>

#include <cstring>

#include "math.h"

namespace {

using fastffn::Code;
using fastffn::DType;
using fastffn::Elementwise;
using fastffn::Instruction;
using fastffn::Operand;

constexpr int64_t kLanes = 16;   // loops run to a multiple of it
constexpr int64_t kStrip = 128;  // and unroll this far: exp and tanh of several vectors overlap

// Block lengths. Its registers should stay far below L1, which the operands stream through too: 8
// KiB measured up to 1.6 times faster than 24 KiB on long backward programs. Below 256 elements the
// calls of the loops show. A program of one instruction keeps nothing, so its blocks are long.
constexpr int64_t kRegisterBytes = 8 * 1024;
constexpr int64_t kMinBlock = 256;
constexpr int64_t kMaxBlock = 1024;
constexpr int64_t kLoneBlock = 16 * 1024;

// From this many instructions on the next block is prefetched, an operand an instruction: so long a
// block leaves the hardware's prefetchers behind (1.5 times slower without it from 9 instructions
// on, no faster with it up to 7).
constexpr int kLongProgram = 8;
constexpr int64_t kLine = 64;

constexpr int64_t kSerialElements = 16 * 1024;  // fewer: waking threads costs more than they save

template <class T>
using Loop = void (*)(T* out, const T* s0, const T* s1, const T* s2, int64_t n);

// One loop per opcode. The operand letters of each slot are those of fastffn/expr/primitives.py.
#define C(value) static_cast<T>(value)
#define STEP(v0, v1, v2, formula)      \
  [[maybe_unused]] const T v0 = s0[i]; \
  [[maybe_unused]] const T v1 = s1[i]; \
  [[maybe_unused]] const T v2 = s2[i]; \
  out[i] = formula;
#define LOOP(name, v0, v1, v2, formula)                                                            \
  static void name(T* out, const T* s0, const T* s1, const T* s2, int64_t n) {                     \
    const int64_t strips = n & -kStrip, end = n & -kLanes;                                         \
    for (int64_t at = 0; at < strips; at += kStrip) {                                              \
      _Pragma("omp simd") for (int64_t i = at; i < at + kStrip; ++i) { STEP(v0, v1, v2, formula) } \
    }                                                                                              \
    _Pragma("omp simd") for (int64_t i = strips; i < end; ++i) { STEP(v0, v1, v2, formula) }       \
  }
template <class T>
struct Loops {
#define BINARY(name, y_, ga_, gb_) \
  LOOP(name##_y, a, b, unused, y_) \
  LOOP(name##_da, g, a, b, ga_)    \
  LOOP(name##_db, g, a, b, gb_)
#define UNARY(name, y_, ga_)              \
  LOOP(name##_y, a, unused0, unused1, y_) \
  LOOP(name##_da, g, a, y, ga_)
#define GATED(name, t_, y_, ga_)          \
  LOOP(name##_t, a, unused0, unused1, t_) \
  LOOP(name##_y, a, t, unused, y_)        \
  LOOP(name##_da, g, a, t, ga_)           \
  static T name##_of(T a) {               \
    const T t = t_;                       \
    return y_;                            \
  }                                       \
  LOOP(name##_ty, a, unused0, unused1, name##_of(a))
#define FUSED(name, y_) LOOP(name##_y, a, b, c, y_)
#include "../primitives.def"
#undef BINARY
#undef UNARY
#undef GATED
#undef FUSED

  // By opcode: four slots a primitive.
  static constexpr Loop<T> table[] = {
#define BINARY(name, ...) nullptr, name##_y, name##_da, name##_db,
#define UNARY(name, ...) nullptr, name##_y, name##_da, nullptr,
#define GATED(name, ...) name##_t, name##_y, name##_da, name##_ty,
#define FUSED(name, ...) nullptr, name##_y, nullptr, nullptr,
#include "../primitives.def"
#undef BINARY
#undef UNARY
#undef GATED
#undef FUSED
  };
};
#undef LOOP
#undef STEP
#undef C

template <class T, class S>
void load_as(T* to, const char* data, int64_t offset, int64_t stride, int64_t n) {
  const S* from = reinterpret_cast<const S*>(data) + offset;
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(widen(from[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(widen(from[i * stride]));
  }
}

template <class T, class S>
void store_as(const T* from, char* data, int64_t offset, int64_t stride, int64_t n) {
  S* to = reinterpret_cast<S*>(data) + offset;
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = narrow<S>(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i * stride] = narrow<S>(from[i]);
  }
}

template <class T>
void load(T* to, const Operand& from, int64_t offset, int64_t stride, int64_t n) {
  switch (from.dtype) {
    case DType::kFloat32:
      return load_as<T, float>(to, from.data, offset, stride, n);
    case DType::kFloat64:
      return load_as<T, double>(to, from.data, offset, stride, n);
    case DType::kBFloat16:
      return load_as<T, bfloat16>(to, from.data, offset, stride, n);
    case DType::kFloat16:
      return load_as<T, float16>(to, from.data, offset, stride, n);
  }
}

template <class T>
void store(const T* from, const Operand& to, int64_t offset, int64_t stride, int64_t n) {
  switch (to.dtype) {
    case DType::kFloat32:
      return store_as<T, float>(from, to.data, offset, stride, n);
    case DType::kFloat64:
      return store_as<T, double>(from, to.data, offset, stride, n);
    case DType::kBFloat16:
      return store_as<T, bfloat16>(from, to.data, offset, stride, n);
    case DType::kFloat16:
      return store_as<T, float16>(from, to.data, offset, stride, n);
  }
}

template <class T>
constexpr DType kNative = sizeof(T) == 4 ? DType::kFloat32 : DType::kFloat64;

// How the iteration space falls into blocks: the innermost dimension is cut, the others are counted
// through.
struct Blocks {
  int64_t length;   // elements of a block, a multiple of kLanes
  int64_t per_row;  // blocks along the innermost dimension
  int64_t rows;     // product of the other dimensions

  Blocks(const Elementwise& call, int64_t element_bytes) {
    const int64_t columns = call.size[call.dims - 1];
    const int64_t fit = kRegisterBytes / (call.code->registers * element_bytes) & -kStrip;
    const int64_t most = call.code->length == 1 ? kLoneBlock
                         : fit < kMinBlock      ? kMinBlock
                         : fit > kMaxBlock      ? kMaxBlock
                                                : fit;
    per_row = (columns + most - 1) / most;
    const int64_t even = (columns + per_row - 1) / per_row;
    const int64_t step = even > kStrip ? kStrip : kLanes;
    length = (even + step - 1) / step * step;
    per_row = (columns + length - 1) / length;
    rows = 1;
    for (int d = 0; d + 1 < call.dims; ++d) rows *= call.size[d];
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
    const int64_t padded = (n + kLanes - 1) & -kLanes;
    const bool whole = n == padded;
    T* in_place[fastffn::kMaxOperands];  // operands that are used where they lie, else null
    for (int k = 0; k < call_.count(); ++k) {
      const Operand& operand = call_.operands[k];
      const bool input = k < code_.inputs;
      in_place[k] = whole && dense_[k] ? reinterpret_cast<T*>(operand.data) + offset[k] : nullptr;
      T*& home = reg[input ? k : code_.results[k - code_.inputs]];
      if (in_place[k]) {
        home = in_place[k];  // an input's register is only read
      } else if (input) {
        load(home, operand, offset[k], operand.stride[inner_], n);
        for (int64_t j = n; j < padded; ++j) home[j] = T(0);  // computed too, and dropped
      }
    }
    const int prefetched = code_.length >= kLongProgram ? call_.count() : 0;
    for (int i = 0; i < code_.length; ++i) {
      const Instruction& at = code_.instructions[i];
      if (i < prefetched && in_place[i]) {
        for (int64_t j = n; j < 2 * n; j += kLine / sizeof(T)) __builtin_prefetch(in_place[i] + j);
      }
      Loops<T>::table[at.opcode](reg[at.target], reg[at.source[0]], reg[at.source[1]],
                                 reg[at.source[2]], padded);
    }
    for (int k = 0; k < code_.outputs; ++k) {
      const int operand = code_.inputs + k;
      if (in_place[operand]) continue;
      const Operand& to = call_.operands[operand];
      store(reg[code_.results[k]], to, offset[operand], to.stride[inner_], n);
    }
  }

  const Elementwise& call_;
  const Code& code_;
  const Blocks& blocks_;
  const int inner_;
  T* home_[fastffn::kMaxRegisters];
  bool dense_[fastffn::kMaxOperands];
};

template <class T>
void run(const Elementwise& call) {
  const Blocks blocks(call, sizeof(T));
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

const Variant variant = {elementwise, function};

}  // namespace fastffn::FASTFFN_ISA
