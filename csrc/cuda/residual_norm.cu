// The row kernel, forward: program, dropout, residual and LayerNorm (../residual_norm.h). Rows of
// up to 1024 columns belong to a warp each, longer ones to a block. The sums s stay in shared
// memory between the passes for mean, variance and result; where they do not fit, each pass
// computes them again.

#include "rows.cuh"

namespace fastffn {
namespace {

using namespace device;

constexpr int64_t kMaxBlocks = 4096;

struct ForwardArguments {
  ResidualNormForward call;
  RoutineSource routine;
  int lanes;
  bool keep;
};

// Registers: those of the program, two for other operands, then the sums that are kept.
constexpr int kOthers = 2;

template <class T>
__global__ void __launch_bounds__(kRowThreads, kMinBlocks<T> / 2)
    residual_norm_kernel(const __grid_constant__ ForwardArguments arguments) {
  const ResidualNormForward& call = arguments.call;
  const Routine& routine = copy_routine(0, arguments.routine);
  const Registers<T> registers{kRoutineWords + kScratchWords + static_cast<int>(threadIdx.x),
                               static_cast<int>(blockDim.x)};
  const int other = arguments.routine.registers, kept = other + kOthers;
  const int lanes = arguments.lanes;
  const Team<T> team{lanes, reinterpret_cast<T*>(shared_memory + kRoutineWords)};
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int teams = static_cast<int>(blockDim.x) / lanes;
  const Mask<T> mask(call.dropout);
  const uint32_t added = call.residual.data ? 1 : 0;
  const uint32_t affine = (call.weight.data ? 1u : 0u) | (call.bias.data ? 2u : 0u);

  for (int64_t row = blockIdx.x * int64_t{teams} + threadIdx.x / lanes; row < call.rows;
       row += gridDim.x * int64_t{teams}) {
    T mean = T(0), rstd = T(0);
#pragma unroll 1
    for (int pass = 0; pass < 3; ++pass) {  // mean, variance, result
      T total = T(0), none = T(0);
#pragma unroll 1
      for (int64_t column = lane * kLanes, slot = kept; column < call.columns;
           column += lanes * kLanes, ++slot) {
        const int n = lanes_left(call.columns, column);
        T s[kLanes];
        if (pass == 0 || !arguments.keep) {
          load_all(registers, routine.inputs + 1, routine.read | added << routine.inputs, n,
                   [&](int k) {
                     return k < routine.inputs ? locate(call.inputs[k], row, column, k)
                                               : locate(call.residual, row, column, other);
                   });
          run(0, registers);
          registers.read(routine.results[0], s);
          mask.apply(s, row, column);
          T residual[kLanes];
          registers.read(other, residual);
#pragma unroll
          for (int j = 0; j < kLanes; ++j) s[j] += added ? residual[j] : T(0);
          if (arguments.keep) registers.write(static_cast<int>(slot), s);
        } else {
          registers.read(static_cast<int>(slot), s);
        }
        if (pass < 2) {
#pragma unroll
          for (int j = 0; j < kLanes; ++j) {
            const T term = pass == 0 ? s[j] : (s[j] - mean) * (s[j] - mean);
            total += j < n ? term : T(0);
          }
          continue;
        }
        load_all(registers, kOthers, affine, n, [&](int k) {
          return locate(k == 0 ? call.weight : call.bias, row, column, other + k);
        });
        T weight[kLanes], bias[kLanes];
        registers.read(other, weight);
        registers.read(other + 1, bias);
#pragma unroll
        for (int j = 0; j < kLanes; ++j) {
          s[j] = (s[j] - mean) * rstd;
          if (affine & 1) s[j] *= weight[j];
          if (affine & 2) s[j] += bias[j];
        }
        const Located y = locate(call.y, row, column, 0);
        store(s, y.data, y.dtype, y.offset, y.stride, n);
      }
      if (pass == 2) break;
      team.add_up(total, none);
      const T average = total / static_cast<T>(call.columns);
      if (pass == 0) {
        mean = average;
      } else {
        rstd = T(1) / sqrt(average + static_cast<T>(call.eps));
      }
    }
    if (lane == 0) {
      if (call.mean.data) reinterpret_cast<T*>(call.mean.data)[row * call.mean.row] = mean;
      if (call.rstd.data) reinterpret_cast<T*>(call.rstd.data)[row * call.rstd.row] = rstd;
    }
  }
}

template <class T>
void launch_forward(ForwardArguments& arguments, const Place& place) {
  const ResidualNormForward& call = arguments.call;
  const size_t fixed = (kRoutineWords + kScratchWords) * sizeof(uint4);
  const RowShape shape = choose_rows<T>(call.columns, fixed, place, [&](const RowShape& s) {
    return arguments.routine.registers + kOthers + (s.keep ? s.groups(call.columns) : 0);
  });
  arguments.lanes = shape.lanes;
  arguments.keep = shape.keep;
  const int64_t teams = shape.threads / shape.lanes, blocks = (call.rows + teams - 1) / teams;
  launch(residual_norm_kernel<T>, blocks < kMaxBlocks ? blocks : kMaxBlocks, shape.threads,
         shape.bytes, place, arguments);
}

}  // namespace

void cuda_residual_norm(const ResidualNormForward& call, const DeviceRoutines& routines,
                        const Place& place) {
  const OnDevice current(place.device);
  ForwardArguments arguments{};
  arguments.call = call;
  arguments.routine = routine_source(*call.program, routines.program, routines.registers);
  call.in_double ? launch_forward<double>(arguments, place)
                 : launch_forward<float>(arguments, place);
}

}  // namespace fastffn
