// What every launch needs: the device, the size of the shared memory, and errors as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "interpreter.h"

namespace fastffn {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
}

// Makes a device current for a scope.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "no device");
    if (before_ == device) before_ = -1;
    if (before_ >= 0) check(cudaSetDevice(device), "the device cannot be used");
  }
  ~OnDevice() {
    if (before_ >= 0) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;

 private:
  int before_ = -1;
};

// Shared memory that one block may have.
inline size_t shared_limit(int device) {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "the device does not answer");
  return bytes;
}

// Threads of a block, from `most` by halves down to a warp, so that the blocks stay small: shared
// memory, not the number of threads, limits how much runs at once.
template <class Bytes>
int choose_threads(int most, int device, Bytes bytes) {
  constexpr size_t kComfortable = 48 * 1024;
  int threads = most;
  while (threads > 32 && bytes(threads) > kComfortable) threads /= 2;
  if (bytes(threads) > kComfortable && bytes(threads) > shared_limit(device))
    throw std::runtime_error("CUDA interpreter: the program's registers need " +
                             std::to_string(bytes(threads)) +
                             " bytes of shared memory, more than a block has");
  return threads;
}

template <class Arguments>
void launch(void (*kernel)(Arguments), int64_t blocks, int threads, size_t shared,
            const Place& place, const Arguments& arguments) {
  static_assert(sizeof(Arguments) <= 4096, "the parameters of a kernel");
  if (blocks > 0x7fffffff) throw std::runtime_error("CUDA interpreter: too many blocks");
  if (shared > 48 * 1024)  // to the limit: another thread may launch the same kernel with more
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_limit(place.device))),
          "shared memory");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = reinterpret_cast<cudaStream_t>(place.stream);
  check(cudaLaunchKernelEx(&config, kernel, arguments), "launch");
}

}  // namespace fastffn
