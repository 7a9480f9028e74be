// One instruction on a thread's registers, and the run of a whole Routine: a switch over the
// opcodes that ../primitives.def gives, uniform over the block.
//
// A register holds kLanes neighbouring elements of each thread. It lies in shared memory as packs
// of 16 bytes, [register][pack][thread], which all threads reach without bank conflicts. A thread
// touches its own column only, so that running a program needs no barrier.
//
// Why not in the registers of the machine: their number must be known to the compiler. Why not in
// local memory: it goes through L1, which the operands stream through, at a quarter of the rate.
#pragma once

#include "math.cuh"
#include "routine.h"

namespace fastffn {

// All shared memory of a block; each kernel divides it. Places in it are kept as indices, not as
// pointers, which a function that is not inlined would have to take for those of any memory.
extern __shared__ uint4 shared_memory[];

}  // namespace fastffn

namespace fastffn::device {

constexpr int kLanes = 8;  // one call of philox (../random.h), 16 bytes of a 16-bit type

template <class T>
constexpr int kPackSize = 16 / sizeof(T);
template <class T>
constexpr int kPacks = kLanes / kPackSize<T>;

// Blocks of 128 threads per multiprocessor that the compiler shall leave room for. Without a number
// it aims higher and saves registers to memory; double needs more of them.
template <class T>
constexpr int kMinBlocks = sizeof(T) == 4 ? 5 : 2;

template <class T>
struct alignas(16) Pack {
  T v[kPackSize<T>];
};

// The registers of one thread.
template <class T>
struct Registers {
  int mine;     // index of its first pack
  int threads;  // of the block

  static constexpr size_t kBytes = kLanes * sizeof(T);  // of one register of one thread

  __device__ __forceinline__ Pack<T>* at(int index) const {
    return reinterpret_cast<Pack<T>*>(shared_memory) + mine + index * kPacks<T> * threads;
  }
  __device__ __forceinline__ void read(int index, T (&v)[kLanes]) const {
    const Pack<T>* from = at(index);
#pragma unroll
    for (int p = 0; p < kPacks<T>; ++p) {
      const Pack<T> pack = from[p * threads];
#pragma unroll
      for (int e = 0; e < kPackSize<T>; ++e) v[p * kPackSize<T> + e] = pack.v[e];
    }
  }
  __device__ __forceinline__ void write(int index, const T (&v)[kLanes]) const {
    Pack<T>* to = at(index);
#pragma unroll
    for (int p = 0; p < kPacks<T>; ++p) {
      Pack<T> pack;
#pragma unroll
      for (int e = 0; e < kPackSize<T>; ++e) pack.v[e] = v[p * kPackSize<T> + e];
      to[p * threads] = pack;
    }
  }
};

// The lines of the table, in order; each owns four opcodes, see fastffn/expr/primitives.py.
enum Line {
#define BINARY(name, ...) kLine_##name,
#define UNARY(name, ...) kLine_##name,
#define GATED(name, ...) kLine_##name,
#define FUSED(name, ...) kLine_##name,
#include "../primitives.def"
#undef BINARY
#undef UNARY
#undef GATED
#undef FUSED
  kLines
};
static_assert(4 * kLines <= 256, "an opcode is a byte");

#define C(value) static_cast<T>(value)
template <class T>
struct Gated {
#define BINARY(...)
#define UNARY(...)
#define FUSED(...)
#define GATED(name, t_, y_, ga_)                     \
  static __device__ __forceinline__ T name##_(T a) { \
    const T t = t_;                                  \
    return y_;                                       \
  }
#include "../primitives.def"
#undef BINARY
#undef UNARY
#undef GATED
#undef FUSED
};

// A routine in shared memory, by the index of its first word.
__device__ __forceinline__ const Routine& routine_at(int word) {
  return *reinterpret_cast<const Routine*>(shared_memory + word);
}

// Runs the instructions of the routine at `word`.
template <class T>
__device__ __forceinline__ void run(int word, Registers<T> registers) {
  const Routine& routine = routine_at(word);
  const int threads = registers.threads;
  for (int i = 0; i < routine.length; ++i) {
    const Step step = routine.steps[i];
    Pack<T>* out = registers.at(step.target);
    const Pack<T>*s0 = registers.at(step.source[0]), *s1 = registers.at(step.source[1]),
          *s2 = registers.at(step.source[2]);
    switch (step.opcode) {
#define CASE(name, place, v0, v1, v2, formula)                             \
  case 4 * kLine_##name + place:                                           \
    _Pragma("unroll 1") for (int p = 0; p < kPacks<T>; ++p) {              \
      [[maybe_unused]] const Pack<T> p0 = s0[p * threads];                 \
      [[maybe_unused]] const Pack<T> p1 = s1[p * threads];                 \
      [[maybe_unused]] const Pack<T> p2 = s2[p * threads];                 \
      Pack<T> result;                                                      \
      _Pragma("unroll") for (int e = 0; e < kPackSize<T>; ++e) {           \
        [[maybe_unused]] const T v0 = p0.v[e], v1 = p1.v[e], v2 = p2.v[e]; \
        result.v[e] = formula;                                             \
      }                                                                    \
      out[p * threads] = result;                                           \
    }                                                                      \
    break;
#define BINARY(name, y_, ga_, gb_) \
  CASE(name, 1, a, b, unused, y_)  \
  CASE(name, 2, g, a, b, ga_)      \
  CASE(name, 3, g, a, b, gb_)
#define UNARY(name, y_, ga_)             \
  CASE(name, 1, a, unused0, unused1, y_) \
  CASE(name, 2, g, a, y, ga_)
#define GATED(name, t_, y_, ga_)         \
  CASE(name, 0, a, unused0, unused1, t_) \
  CASE(name, 1, a, t, unused, y_)        \
  CASE(name, 2, g, a, t, ga_)            \
  CASE(name, 3, a, unused0, unused1, Gated<T>::name##_(a))
#define FUSED(name, y_) CASE(name, 1, a, b, c, y_)
#include "../primitives.def"
#undef BINARY
#undef UNARY
#undef GATED
#undef FUSED
#undef CASE
    }
  }
}
#undef C

// Copies a routine into shared memory, where the index of an instruction need not be known to the
// compiler, and ends with a barrier.
__device__ __forceinline__ const Routine& copy_routine(int word, const RoutineSource& source) {
  const Routine& from = source.address ? *source.address : source.value;
  const int bytes = static_cast<int>(offsetof(Routine, steps)) + from.length * sizeof(Step);
  const uint4* words = reinterpret_cast<const uint4*>(&from);
  for (int i = threadIdx.x; i * 16 < bytes; i += blockDim.x) shared_memory[word + i] = words[i];
  __syncthreads();
  return routine_at(word);
}
constexpr int kRoutineWords = sizeof(Routine) / sizeof(uint4);

}  // namespace fastffn::device
