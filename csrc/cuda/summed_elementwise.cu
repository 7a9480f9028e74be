// A Program over the rows of matrices, with column sums of some outputs: the segment's backward and
// its bias gradients in one pass.
//
// A block takes a chunk of rows and a strip of up to 32 groups of kLanes columns. Its threads form
// teams of one strip's width, which take the rows in turn; every thread adds up its own columns in
// shared memory, and the teams' sums are added in order at the end. No atomics: the same result
// every time.
//
// The program may lie in device memory (routine.h), and with it the number of columns that are
// computed: a captured graph then replays for another program or another width.

#include <algorithm>

#include "launch.cuh"
#include "memory.cuh"

namespace fastffn {
namespace {

using namespace device;

constexpr int kThreads = 128;
constexpr int kStrip = 32;

struct SummedArguments {
  SummedElementwise call;
  RoutineSource routine;
  int strips;
  int lanes;  // threads of a team
};

__device__ __forceinline__ int clamp_lanes(int64_t rest) {
  return rest < 0 ? 0 : rest < kLanes ? static_cast<int>(rest) : kLanes;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T>)
    summed_kernel(const __grid_constant__ SummedArguments arguments) {
  const SummedElementwise& call = arguments.call;
  const Routine& routine = copy_routine(0, arguments.routine);
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const Registers<T> registers{kRoutineWords + thread, threads};
  const int sums = arguments.routine.registers;  // the register of the first sum
  const T zeros[kLanes] = {};
  for (int s = 0; s < call.summed_count; ++s) registers.write(sums + s, zeros);

  const int lanes = arguments.lanes, teams = threads / lanes;
  const int team = thread / lanes;
  const int64_t chunk = blockIdx.x / arguments.strips, strip = blockIdx.x % arguments.strips;
  const int64_t first_column = strip * lanes * kLanes;
  const int64_t column = first_column + thread % lanes * kLanes;
  const int64_t width = routine.width < 0 ? call.columns : routine.width;
  const int n = clamp_lanes(call.columns - column);
  const int live = min(n, clamp_lanes(width - column));
  const int64_t end = min(call.rows, (chunk + 1) * call.chunk);
  const int64_t first = team < teams && n > 0 ? chunk * call.chunk + team : end;
  for (int64_t row = first; row < end; row += teams) {
    if (live > 0) {
      load_all(registers, routine.inputs, routine.read, live,
               [&](int k) { return locate(call.operands[k], row, column, k); });
      run(0, registers);
    }
#pragma unroll 1
    for (int k = 0; k < routine.outputs; ++k) {
      T v[kLanes];
      registers.read(routine.results[k], v);
#pragma unroll
      for (int j = 0; j < kLanes; ++j) v[j] = j < live ? v[j] : T(0);
      const Located to = locate(call.operands[routine.inputs + k], row, column, 0);
      store(v, to.data, to.dtype, to.offset, to.stride, n);
    }
#pragma unroll 1
    for (int s = 0; s < call.summed_count; ++s) {
      T v[kLanes], sum[kLanes];
      registers.read(routine.results[call.summed[s]], v);
      registers.read(sums + s, sum);
#pragma unroll
      for (int j = 0; j < kLanes; ++j) sum[j] += j < live ? v[j] : T(0);
      registers.write(sums + s, sum);
    }
  }
  __syncthreads();

  // One pack of one sum at a time, over the teams.
  const int packs = lanes * kPacks<T>;
  for (int item = thread; item < call.summed_count * packs; item += threads) {
    const int s = item / packs, pack = item % packs / lanes, lane = item % lanes;
    const Registers<T> theirs{kRoutineWords + lane, threads};
    const Pack<T>* from = theirs.at(sums + s) + pack * threads;
    Pack<T> total = from[0];
    for (int t = 1; t < teams; ++t) {
      const Pack<T> part = from[t * lanes];
      for (int e = 0; e < kPackSize<T>; ++e) total.v[e] += part.v[e];
    }
    const int64_t at = first_column + lane * kLanes + pack * kPackSize<T>;
    T* to = reinterpret_cast<T*>(call.sums) + (chunk * call.summed_count + s) * call.columns + at;
    for (int e = 0; e < kPackSize<T>; ++e)
      if (at + e < call.columns) to[e] = total.v[e];
  }
}

template <class T>
void launch_summed(SummedArguments& arguments, const Place& place) {
  const SummedElementwise& call = arguments.call;
  const int64_t groups = (call.columns + kLanes - 1) / kLanes;
  arguments.strips = static_cast<int>((groups + kStrip - 1) / kStrip);
  arguments.lanes = static_cast<int>((groups + arguments.strips - 1) / arguments.strips);
  const auto bytes = [&](int threads) {
    const int registers = arguments.routine.registers + call.summed_count;
    return sizeof(Routine) + registers * Registers<T>::kBytes * threads;
  };
  const int threads = choose_threads(kThreads, place.device, bytes);
  const int64_t chunks = (call.rows + call.chunk - 1) / call.chunk;
  launch(summed_kernel<T>, chunks * arguments.strips, threads, bytes(threads), place, arguments);
}

}  // namespace

void cuda_summed_elementwise(const SummedElementwise& call, const DeviceRoutines& routines,
                             const Place& place) {
  const OnDevice current(place.device);
  SummedArguments arguments{};
  arguments.call = call;
  arguments.routine = routine_source(*call.program, routines.program, routines.registers);
  call.in_double ? launch_summed<double>(arguments, place) : launch_summed<float>(arguments, place);
}

bool cuda_takes(const Code& code) {
  return code.length <= kMaxSteps && code.registers <= kSafeRegisters;
}

std::string cuda_routine(const Code& code, int registers, int64_t width) {
  Routine routine = make_routine(code);
  if (code.registers > registers)
    throw std::runtime_error("CUDA interpreter: a program of " + std::to_string(code.registers) +
                             " registers where there is place for " + std::to_string(registers));
  routine.width = width;
  return {reinterpret_cast<const char*>(&routine), sizeof(Routine)};
}

}  // namespace fastffn
