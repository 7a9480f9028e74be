// Stands for CUDA's header where g++ compiles csrc/cuda for the CPU: the part of the language and
// of the runtime that those files use. Each thread of a block is a fiber that runs until it waits
// at a barrier (emulator.cpp); blocks run one after the other. So the kernels' logic is tested
// without a device: indices, barriers, shuffles, shared memory, and what happens at the edges. What
// it does not show is a device's arithmetic, its memory model and its speed.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __shared__  // only for the extern array that emulator.cpp defines
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorLaunchFailure };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
struct CUstream_st;
using cudaStream_t = CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace emulator {
constexpr int kSharedLimit = 227 * 1024;
// Runs body(argument) as every thread of every block.
cudaError_t run(const cudaLaunchConfig_t& config, void (*body)(void*), void* argument);
void block_barrier();
// Waits for the warp; returns what `lane` of it gave.
uint64_t exchange(uint64_t mine, int lane);
const char* last_message();
}  // namespace emulator

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  auto call = [&] { kernel(static_cast<Parameters>(arguments)...); };
  return emulator::run(*config, [](void* body) { (*static_cast<decltype(call)*>(body))(); }, &call);
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
  return bytes <= emulator::kSharedLimit ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulator::kSharedLimit;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidValue;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? emulator::last_message() : "invalid value";
}

inline void __syncthreads() { emulator::block_barrier(); }
inline void __syncwarp() { emulator::exchange(0, 0); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emulator::exchange(bits, (threadIdx.x % 32) ^ mask);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

#define __builtin_assume(condition)
inline float __uint_as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t __float_as_uint(float x) { return __builtin_bit_cast(uint32_t, x); }
inline double __hiloint2double(int high, int low) {
  return __builtin_bit_cast(
      double, uint64_t{static_cast<uint32_t>(high)} << 32 | static_cast<uint32_t>(low));
}
inline int __double2loint(double x) { return static_cast<int>(__builtin_bit_cast(uint64_t, x)); }
inline int __double2hiint(double x) {
  return static_cast<int>(__builtin_bit_cast(uint64_t, x) >> 32);
}
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline float __fdividef(float a, float b) { return a / b; }
template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
