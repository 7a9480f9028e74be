// A Program over n-dimensional strided operands: each thread takes kLanes neighbours along the
// innermost dimension, loads them into its registers, runs the program and stores the outputs.

#include "launch.cuh"
#include "memory.cuh"

namespace fastffn {
namespace {

using namespace device;

constexpr int kThreads = 128;
constexpr int64_t kMaxBlocks = 4096;  // a few waves of the largest devices; the blocks then loop

// Division of numbers in [0, 2^63) by one that the host knows, as a multiplication (Granlund and
// Montgomery, PLDI 1994): the machine has no division, and a call of the library's for 64 bits
// would make the compiler save what is live.
struct Divisor {
  uint64_t factor;
  int64_t value;
  int shift;

  static Divisor of(int64_t value) {
    int shift = 0;
    while (shift < 63 && int64_t{1} << shift < value) ++shift;
    const auto whole = static_cast<unsigned __int128>((uint64_t{1} << shift) - value) << 64;
    return {static_cast<uint64_t>(whole / static_cast<uint64_t>(value)) + 1, value, shift};
  }

  __device__ __forceinline__ int64_t divide(int64_t number, int64_t& rest) const {
    const auto n = static_cast<uint64_t>(number);
    const auto quotient = static_cast<int64_t>((__umul64hi(factor, n) + n) >> shift);
    rest = number - quotient * value;
    return quotient;
  }
};

struct ElementwiseArguments {
  Elementwise call;
  RoutineSource routine;
  Divisor size[kMaxDims - 1];  // of the outer dimensions
  Divisor groups_per_row;      // of kLanes elements along the innermost dimension
  int64_t groups;
};

template <class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T>)
    elementwise_kernel(const __grid_constant__ ElementwiseArguments arguments) {
  const Elementwise& call = arguments.call;
  const Routine& routine = copy_routine(0, arguments.routine);
  const Registers<T> registers{kRoutineWords + static_cast<int>(threadIdx.x),
                               static_cast<int>(blockDim.x)};
  const int inner = call.dims - 1;
  for (int64_t group = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; group < arguments.groups;
       group += gridDim.x * int64_t{blockDim.x}) {
    int64_t column, index[kMaxDims - 1];
    int64_t row = arguments.groups_per_row.divide(group, column);
    column *= kLanes;
#pragma unroll
    for (int d = kMaxDims - 2; d >= 0; --d)
      if (d < inner) row = arguments.size[d].divide(row, index[d]);
    const auto place = [&](int k) -> Located {
      const Operand& operand = call.operands[k];
      int64_t offset = column * operand.stride[inner];
#pragma unroll
      for (int d = 0; d < kMaxDims - 1; ++d)
        if (d < inner) offset += index[d] * operand.stride[d];
      return {operand.data, operand.dtype, offset, operand.stride[inner], k};
    };
    const int64_t rest = call.size[inner] - column;
    const int n = rest < kLanes ? static_cast<int>(rest) : kLanes;
    load_all(registers, routine.inputs, routine.read, n, place);
    run(0, registers);
#pragma unroll 1
    for (int k = 0; k < routine.outputs; ++k) {
      T v[kLanes];
      registers.read(routine.results[k], v);
      const Located to = place(routine.inputs + k);
      store(v, to.data, to.dtype, to.offset, to.stride, n);
    }
  }
}

template <class T>
void launch_elementwise(const ElementwiseArguments& arguments, const Place& place) {
  const auto bytes = [&](int threads) {
    return sizeof(Routine) + arguments.routine.registers * Registers<T>::kBytes * threads;
  };
  const int threads = choose_threads(kThreads, place.device, bytes);
  const int64_t blocks = (arguments.groups + threads - 1) / threads;
  launch(elementwise_kernel<T>, blocks < kMaxBlocks ? blocks : kMaxBlocks, threads, bytes(threads),
         place, arguments);
}

}  // namespace

void cuda_elementwise(const Elementwise& call, const Place& place) {
  const OnDevice current(place.device);
  ElementwiseArguments arguments{};
  arguments.call = call;
  arguments.routine = routine_source(*call.code, 0, 0);
  arguments.groups = (call.size[call.dims - 1] + kLanes - 1) / kLanes;
  arguments.groups_per_row = Divisor::of(arguments.groups);
  for (int d = 0; d + 1 < call.dims; ++d) {
    arguments.size[d] = Divisor::of(call.size[d]);
    arguments.groups *= call.size[d];
  }
  call.in_double() ? launch_elementwise<double>(arguments, place)
                   : launch_elementwise<float>(arguments, place);
}

}  // namespace fastffn
