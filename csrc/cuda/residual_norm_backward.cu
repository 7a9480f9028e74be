// The row kernel, backward: from dy the gradients of the program's inputs, of the residual, and the
// column sums for those of weight, bias and more, in one pass over the rows.
//
// With x = (s - mean) rstd and g = dy * weight, LayerNorm's gradient is
//   ds = rstd (g - average(g) - x average(g x))
// (Ba et al., Layer Normalization, 2016). A first walk over the row's columns computes s again and
// the two averages, a second one the rest. A block takes a chunk of rows. Rows of up to 1024
// columns belong to a warp each, which keeps its sums in shared memory; the warps' sums are added
// in order at the end. Longer rows belong to the block, and a thread adds to its own columns of
// `sums` in memory. No atomics: the same result every time.

#include "rows.cuh"

namespace fastffn {
namespace {

using namespace device;

struct BackwardArguments {
  ResidualNormBackward call;
  RoutineSource program;
  RoutineSource gradient;
  int lanes;
  int groups;  // of a thread
  bool keep;
};

constexpr int kFirstPack = 2 * kRoutineWords + kScratchWords;  // of the registers

// Registers: those of the programs, these operands, x of each group, the sums of each group.
enum Other { kResidual, kDy, kWeight, kOthers };

// One copy for both programs: with two, the kernel in double has too few machine registers.
template <class T>
__device__ __noinline__ void run_apart(int word, Registers<T> registers) {
  run(word, registers);
}

// Adds to the sums of one thread's columns.
template <class T>
struct Sums {
  Registers<T> registers;
  int first;  // register of the first sum, or -1: in memory
  int count;
  T* memory;  // of the chunk
  int64_t columns;

  __device__ __forceinline__ void add(int s, int group, int64_t column, const T (&v)[kLanes], int n,
                                      bool first_row) const {
    if (first >= 0) {
      T sum[kLanes];
      registers.read(first + group * count + s, sum);
#pragma unroll
      for (int j = 0; j < kLanes; ++j) sum[j] += v[j];
      registers.write(first + group * count + s, sum);
      return;
    }
    T* to = memory + s * columns + column;
#pragma unroll
    for (int j = 0; j < kLanes; ++j)
      if (j < n) to[j] = first_row ? v[j] : to[j] + v[j];
  }
};

// Adds up the warps' sums of a block and writes them.
template <class T>
__device__ __forceinline__ void add_teams(const Sums<T>& sums, int groups) {
  __syncthreads();
  const int threads = static_cast<int>(blockDim.x), packs = kWarp * kPacks<T>;
  for (int item = threadIdx.x; item < groups * sums.count * packs; item += threads) {
    const int index = item / packs, pack = item % packs / kWarp, lane = item % kWarp;
    const Registers<T> theirs{kFirstPack + lane, threads};
    const Pack<T>* from = theirs.at(sums.first + index) + pack * threads;
    Pack<T> total = from[0];
    for (int t = kWarp; t < threads; t += kWarp) {
      const Pack<T> part = from[t];
      for (int e = 0; e < kPackSize<T>; ++e) total.v[e] += part.v[e];
    }
    const int group = index / sums.count, s = index % sums.count;
    const int64_t at = (lane + group * kWarp) * kLanes + pack * kPackSize<T>;
    for (int e = 0; e < kPackSize<T>; ++e)
      if (at + e < sums.columns) sums.memory[s * sums.columns + at + e] = total.v[e];
  }
}

template <class T>
__global__ void __launch_bounds__(kRowThreads, 1)
    residual_norm_backward_kernel(const __grid_constant__ BackwardArguments arguments) {
  const ResidualNormBackward& call = arguments.call;
  const Routine& program = copy_routine(0, arguments.program);
  const Routine& gradient = copy_routine(kRoutineWords, arguments.gradient);
  const Registers<T> registers{kFirstPack + static_cast<int>(threadIdx.x),
                               static_cast<int>(blockDim.x)};
  const int lanes = arguments.lanes, groups = arguments.groups;
  const int other = max(arguments.program.registers, arguments.gradient.registers),
            kept = other + kOthers;
  const Team<T> team{lanes, reinterpret_cast<T*>(shared_memory + 2 * kRoutineWords)};
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int teams = static_cast<int>(blockDim.x) / lanes;
  const Mask<T> mask(call.dropout);
  const int count = 2 + call.summed_count;
  const uint32_t others = (call.residual.data ? 1u << kResidual : 0) | 1u << kDy |
                          (call.weight.data ? 1u << kWeight : 0);
  const bool in_registers = arguments.keep && lanes == kWarp;
  const Sums<T> sums{registers, in_registers ? kept + groups : -1, count,
                     reinterpret_cast<T*>(call.sums) + blockIdx.x * count * call.columns,
                     call.columns};
  if (in_registers) {
    const T zeros[kLanes] = {};
    for (int i = 0; i < groups * count; ++i) registers.write(sums.first + i, zeros);
  }

  const int64_t first_row = blockIdx.x * call.chunk;
  const int64_t end = min(call.rows, first_row + call.chunk);
  for (int64_t row = first_row + threadIdx.x / lanes; row < end; row += teams) {
    const T mean = reinterpret_cast<const T*>(call.mean.data)[row * call.mean.row];
    const T rstd = reinterpret_cast<const T*>(call.rstd.data)[row * call.rstd.row];
    T average_g = T(0), average_gx = T(0);
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
#pragma unroll 1
      for (int group = 0; group < groups; ++group) {
        const int64_t column = (lane + group * int64_t{lanes}) * kLanes;
        if (column >= call.columns) break;
        const int n = lanes_left(call.columns, column);
        const auto place = [&](int k) {  // the program's inputs come after these
          return locate(k == kResidual ? call.residual
                        : k == kDy     ? call.dy
                                       : call.weight,
                        row, column, other + k);
        };
        T x[kLanes];
        if (pass == 0 || !arguments.keep) {
          load_all(
              registers, kOthers + program.inputs, others | program.read << kOthers, n, [&](int k) {
                return k < kOthers ? place(k)
                                   : locate(call.inputs[k - kOthers], row, column, k - kOthers);
              });
          run_apart(0, registers);
          registers.read(program.results[0], x);
          mask.apply(x, row, column);
          T residual[kLanes];
          registers.read(other + kResidual, residual);
#pragma unroll
          for (int j = 0; j < kLanes; ++j) {
            if (call.residual.data) x[j] += residual[j];
            x[j] = j < n ? (x[j] - mean) * rstd : T(0);
          }
          if (arguments.keep) registers.write(kept + group, x);
        } else {
          registers.read(kept + group, x);
        }
        if (pass == 1) {  // the gradient's input 0 is computed here
          load_all(registers, kOthers + program.inputs,
                   (others & ~(1u << kResidual)) | gradient.read >> 1 << kOthers, n, [&](int k) {
                     return k < kOthers
                                ? place(k)
                                : locate(call.inputs[k - kOthers], row, column, k - kOthers + 1);
                   });
        }
        T dy[kLanes], g[kLanes];
        registers.read(other + kDy, dy);
        registers.read(other + kWeight, g);
#pragma unroll
        for (int j = 0; j < kLanes; ++j) g[j] = call.weight.data ? g[j] * dy[j] : dy[j];
        if (pass == 0) {
          T dyx[kLanes];
#pragma unroll
          for (int j = 0; j < kLanes; ++j) {  // past the end dy is 0
            average_g += j < n ? g[j] : T(0);
            average_gx += j < n ? g[j] * x[j] : T(0);
            dyx[j] = dy[j] * x[j];
          }
          sums.add(0, group, column, dyx, n, row == first_row);
          sums.add(1, group, column, dy, n, row == first_row);
          continue;
        }
        T ds[kLanes], de[kLanes];
#pragma unroll
        for (int j = 0; j < kLanes; ++j) {
          ds[j] = j < n ? rstd * (g[j] - average_g - x[j] * average_gx) : T(0);
          de[j] = ds[j];
        }
        mask.apply(de, row, column);
        registers.write(0, de);
        run_apart(kRoutineWords, registers);
#pragma unroll 1
        for (int k = 0; k <= gradient.outputs; ++k) {  // the last one is the residual's
          const bool last = k == gradient.outputs;
          if (last && !call.dresidual.data) break;
          T v[kLanes];
          registers.read(last ? 0 : gradient.results[k], v);
#pragma unroll
          for (int j = 0; j < kLanes; ++j) v[j] = last ? T(0) : v[j];
          for (int s = 0; s < call.summed_count; ++s)
            if (!last && call.summed[s] == k)
              sums.add(2 + s, group, column, v, n, row == first_row);
          if (last || k == call.added_to) {
#pragma unroll
            for (int j = 0; j < kLanes; ++j) v[j] += ds[j];
          }
          const Located to = locate(last ? call.dresidual : call.gradients[k], row, column, 0);
          store(v, to.data, to.dtype, to.offset, to.stride, n);
        }
      }
      if (pass == 0) {
        team.add_up(average_g, average_gx);
        average_g /= static_cast<T>(call.columns);
        average_gx /= static_cast<T>(call.columns);
      }
    }
  }
  if (in_registers) add_teams(sums, groups);
}

template <class T>
void launch_backward(BackwardArguments& arguments, const Place& place) {
  const ResidualNormBackward& call = arguments.call;
  const size_t fixed = kFirstPack * sizeof(uint4);
  const int programs = arguments.program.registers > arguments.gradient.registers
                           ? arguments.program.registers
                           : arguments.gradient.registers;
  const RowShape shape = choose_rows<T>(call.columns, fixed, place, [&](const RowShape& s) {
    const int sums = s.keep && s.lanes == kWarp ? 2 + call.summed_count : 0;
    return programs + kOthers + (s.keep ? s.groups(call.columns) * (1 + sums) : 0);
  });
  arguments.lanes = shape.lanes;
  arguments.groups = shape.groups(call.columns);
  arguments.keep = shape.keep;
  launch(residual_norm_backward_kernel<T>, (call.rows + call.chunk - 1) / call.chunk, shape.threads,
         shape.bytes, place, arguments);
}

}  // namespace

void cuda_residual_norm_backward(const ResidualNormBackward& call, const DeviceRoutines& routines,
                                 const Place& place) {
  const OnDevice current(place.device);
  BackwardArguments arguments{};
  arguments.call = call;
  arguments.program = routine_source(*call.program, routines.program, routines.registers);
  arguments.gradient = routine_source(*call.gradient, routines.gradient, routines.registers);
  call.in_double ? launch_backward<double>(arguments, place)
                 : launch_backward<float>(arguments, place);
}

}  // namespace fastffn
