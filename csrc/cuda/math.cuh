// The functions of primitives.def in CUDA's accurate versions (about 2 ulp), as overloads for
// float and double: a NaN stays a NaN, and infinities have their limits.
#pragma once

#include <cuda_runtime.h>
#include <math.h>

namespace fastffn::device {

__device__ __forceinline__ float exp(float x) { return ::expf(x); }
__device__ __forceinline__ float expm1(float x) { return ::expm1f(x); }
__device__ __forceinline__ float tanh(float x) { return ::tanhf(x); }
__device__ __forceinline__ float erf(float x) { return ::erff(x); }

// The division within 2 ulp, and 0 for results below 2^-126: the exact one calls a function for
// such rare cases, around which the compiler would have to save what is live.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + ::expf(-x)); }

__device__ __forceinline__ double exp(double x) { return ::exp(x); }
__device__ __forceinline__ double expm1(double x) { return ::expm1(x); }
__device__ __forceinline__ double tanh(double x) { return ::tanh(x); }
__device__ __forceinline__ double erf(double x) { return ::erf(x); }
__device__ __forceinline__ double sigmoid(double x) { return 1.0 / (1.0 + ::exp(-x)); }

template <class T>
__device__ __forceinline__ T where(bool condition, T then, T otherwise) {
  return condition ? then : otherwise;
}

// NaN if either is NaN, as torch.maximum.
template <class T>
__device__ __forceinline__ T maximum(T a, T b) {
  return a > b || a != a ? a : b;
}

}  // namespace fastffn::device
