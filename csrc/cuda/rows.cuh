// What the row kernels share: the threads of a row, sums over them, dropout, and how a block's
// shared memory is laid out.
#pragma once

#include "../random.h"
#include "../residual_norm.h"
#include "launch.cuh"
#include "memory.cuh"

namespace fastffn::device {

constexpr int kWarp = 32;
constexpr int kRowThreads = 256;  // of a block at most
constexpr int64_t kWarpColumns =
    1024;  // rows up to here belong to one warp, longer ones to a block

// How a row kernel is launched.
struct RowShape {
  int threads;  // of a block
  int lanes;    // of them that share a row: a warp, or all
  bool keep;    // whether a row's values stay in shared memory between the passes over it
  size_t bytes;

  // Groups of kLanes columns that one thread computes.
  int groups(int64_t columns) const {
    return static_cast<int>((columns + lanes * kLanes - 1) / (lanes * kLanes));
  }
};

// `registers(shape)`: how many registers each thread needs.
template <class T, class Count>
RowShape choose_rows(int64_t columns, size_t fixed, const Place& place, Count registers) {
  constexpr size_t kComfortable = 64 * 1024;
  const auto fill = [&](RowShape& shape) {
    shape.bytes = fixed + registers(shape) * Registers<T>::kBytes * shape.threads;
  };
  for (const bool keep : {true, false}) {
    const bool warps = keep && columns <= kWarpColumns;
    RowShape shape{warps ? kRowThreads / 2 : kRowThreads, kWarp, keep, 0};
    for (;; shape.threads /= 2) {
      shape.lanes = warps ? kWarp : shape.threads;
      fill(shape);
      if (shape.threads == kWarp || shape.bytes <= kComfortable) break;
    }
    if (shape.bytes <= kComfortable || shape.bytes <= shared_limit(place.device)) return shape;
  }
  throw std::runtime_error(
      "CUDA interpreter: the program's registers need more shared memory than a block has");
}

// The threads of one row.
template <class T>
struct Team {
  int lanes;   // a warp, or the whole block
  T* scratch;  // of the block: two numbers for each warp

  // Sums of a and of b over the team, the same bits in each of its threads. All of them must come.
  __device__ __forceinline__ void add_up(T& a, T& b) const {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      a += __shfl_xor_sync(0xffffffffu, a, mask);
      b += __shfl_xor_sync(0xffffffffu, b, mask);
    }
    if (lanes == kWarp) return;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    if (threadIdx.x % kWarp == 0) {
      scratch[2 * warp] = a;
      scratch[2 * warp + 1] = b;
    }
    __syncthreads();
    a = b = T(0);
    for (int w = 0; w < lanes / kWarp; ++w) {
      a += scratch[2 * w];
      b += scratch[2 * w + 1];
    }
    __syncthreads();  // the next sum writes there
  }
};
constexpr int kScratchWords = 2 * kRowThreads / kWarp * sizeof(double) / sizeof(uint4);

// Dropout of kLanes columns of a row: each is multiplied by a factor or by 0.
template <class T>
struct Mask {
  uint32_t threshold;
  uint32_t key[2];
  int64_t first_row;
  T scale;

  __device__ __forceinline__ explicit Mask(const Dropout& dropout)
      : threshold(dropout.threshold),
        key{},
        first_row(dropout.first_row),
        scale(T(65536) / (T(65536) - static_cast<T>(dropout.threshold))) {
    if (threshold) {
      const uint64_t seed = *dropout.seed;
      key[0] = static_cast<uint32_t>(seed);
      key[1] = static_cast<uint32_t>(seed >> 32);
    }
  }

  __device__ __forceinline__ void apply(T (&v)[kLanes], int64_t row, int64_t column) const {
    static_assert(kLanes == kPhiloxColumns);
    if (threshold == 0) return;
    row += first_row;
    uint32_t words[4] = {static_cast<uint32_t>(column / kLanes), static_cast<uint32_t>(row),
                         static_cast<uint32_t>(row >> 32), 0};
    philox(words, key[0], key[1]);
#pragma unroll
    for (int j = 0; j < kLanes; ++j)  // a dropped NaN stays one, as in torch
      v[j] *= (words[j / 2] >> (j % 2 * 16) & 0xffffu) >= threshold ? scale : T(0);
  }
};

__device__ __forceinline__ int lanes_left(int64_t columns, int64_t column) {
  const int64_t rest = columns - column;
  return rest < kLanes ? static_cast<int>(rest) : kLanes;
}

}  // namespace fastffn::device
