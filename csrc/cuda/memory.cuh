// From memory to registers and back: kLanes neighbouring elements of an operand of any type, as
// accesses of 16 bytes where they lie side by side and are aligned so, of 8 or 4 where the row only
// allows that (a row of 540 16-bit numbers is no multiple of 16 bytes), else one by one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <string.h>

#include "primitives.cuh"

namespace fastffn::device {

__device__ __forceinline__ int bytes_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kFloat64 ? 8 : 2;
}

// The elements as they lie in memory; those past the end are 0.
template <class T>
struct Raw {
  static constexpr int kWords = kLanes * sizeof(T) / 4;
  uint32_t word[kWords];
};

template <class Unit, int kCount, class T>
__device__ __forceinline__ void read_units(Raw<T>& raw, const char* from) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const Unit unit = reinterpret_cast<const Unit*>(from)[i];
    memcpy(raw.word + i * sizeof(Unit) / 4, &unit, sizeof(Unit));
  }
}

template <class Unit, int kCount, class T>
__device__ __forceinline__ void write_units(const Raw<T>& raw, char* to) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    Unit unit;
    memcpy(&unit, raw.word + i * sizeof(Unit) / 4, sizeof(Unit));
    reinterpret_cast<Unit*>(to)[i] = unit;
  }
}

// The first n elements of `kBytes` each, `stride` elements apart. No read-only loads: an output may
// lie where an input does.
template <int kBytes, class T>
__device__ __forceinline__ void fetch_sized(Raw<T>& raw, const char* from, int64_t stride, int n) {
  const auto low = static_cast<unsigned>(reinterpret_cast<uintptr_t>(from));
  const bool dense = stride == 1 && n == kLanes;
  if (dense && low % 16 == 0) {
    read_units<uint4, kBytes / 2>(raw, from);
  } else if (dense && low % 8 == 0) {
    read_units<uint2, kBytes>(raw, from);
  } else if (kBytes == 2 && dense && low % 4 == 0) {
    read_units<uint32_t, 4>(raw, from);
  } else {
#pragma unroll
    for (int j = 0; j < kLanes; ++j) {
      const char* element = from + j * stride * kBytes;
      const bool there = j < n;
      if constexpr (kBytes == 2) {
        const uint32_t half = there ? *reinterpret_cast<const uint16_t*>(element) : 0;
        raw.word[j / 2] = j % 2 ? raw.word[j / 2] | half << 16 : half;
      } else {
#pragma unroll
        for (int w = 0; w < kBytes / 4; ++w)
          raw.word[j * (kBytes / 4) + w] =
              there ? reinterpret_cast<const uint32_t*>(element)[w] : 0;
      }
    }
  }
}

template <int kBytes, class T>
__device__ __forceinline__ void put_sized(const Raw<T>& raw, char* to, int64_t stride, int n) {
  const auto low = static_cast<unsigned>(reinterpret_cast<uintptr_t>(to));
  const bool dense = stride == 1 && n == kLanes;
  if (dense && low % 16 == 0) {
    write_units<uint4, kBytes / 2>(raw, to);
  } else if (dense && low % 8 == 0) {
    write_units<uint2, kBytes>(raw, to);
  } else if (kBytes == 2 && dense && low % 4 == 0) {
    write_units<uint32_t, 4>(raw, to);
  } else {
#pragma unroll
    for (int j = 0; j < kLanes; ++j) {
      char* element = to + j * stride * kBytes;
      if (j >= n) continue;
      if constexpr (kBytes == 2) {
        *reinterpret_cast<uint16_t*>(element) =
            static_cast<uint16_t>(raw.word[j / 2] >> (j % 2 * 16));
      } else {
#pragma unroll
        for (int w = 0; w < kBytes / 4; ++w)
          reinterpret_cast<uint32_t*>(element)[w] = raw.word[j * (kBytes / 4) + w];
      }
    }
  }
}

// `data` with an offset in elements. Elements are never wider than T.
template <class T>
__device__ __forceinline__ Raw<T> fetch(const char* data, DType dtype, int64_t offset,
                                        int64_t stride, int n) {
  Raw<T> raw;
  const char* from = data + offset * bytes_of(dtype);
  __builtin_assume(__isGlobal(from));  // from parameters that are chosen at run time: not evident
  if (dtype == DType::kFloat32) {
    fetch_sized<4>(raw, from, stride, n);
  } else if (dtype != DType::kFloat64) {
    fetch_sized<2>(raw, from, stride, n);
  } else if constexpr (sizeof(T) == 8) {
    fetch_sized<8>(raw, from, stride, n);
  }
  return raw;
}

template <class T>
__device__ __forceinline__ void widen(T (&v)[kLanes], const Raw<T>& raw, DType dtype) {
#pragma unroll
  for (int j = 0; j < kLanes; ++j) {
    const auto half = static_cast<uint16_t>(raw.word[j / 2] >> (j % 2 * 16));
    if (dtype == DType::kFloat32) {
      v[j] = __uint_as_float(raw.word[j]);
    } else if (dtype == DType::kBFloat16) {
      v[j] = __uint_as_float(static_cast<uint32_t>(half) << 16);
    } else if (dtype == DType::kFloat16) {
      v[j] = __half2float(__ushort_as_half(half));
    } else if constexpr (sizeof(T) == 8) {
      v[j] = __hiloint2double(raw.word[2 * j + 1], raw.word[2 * j]);
    }
  }
}

// Rounds to nearest, ties to even. A double goes to 16 bits by way of float, as in torch.
template <class T>
__device__ __forceinline__ void store(const T (&v)[kLanes], char* data, DType dtype, int64_t offset,
                                      int64_t stride, int n) {
  Raw<T> raw;
  char* to = data + offset * bytes_of(dtype);
  __builtin_assume(__isGlobal(to));
  if (dtype == DType::kFloat32) {
#pragma unroll
    for (int j = 0; j < kLanes; ++j) raw.word[j] = __float_as_uint(static_cast<float>(v[j]));
    put_sized<4>(raw, to, stride, n);
  } else if (dtype != DType::kFloat64) {
#pragma unroll
    for (int j = 0; j < kLanes; ++j) {
      const float x = static_cast<float>(v[j]);
      const uint32_t half = dtype == DType::kBFloat16 ? __bfloat16_as_ushort(__float2bfloat16_rn(x))
                                                      : __half_as_ushort(__float2half_rn(x));
      raw.word[j / 2] = j % 2 ? raw.word[j / 2] | half << 16 : half;
    }
    put_sized<2>(raw, to, stride, n);
  } else if constexpr (sizeof(T) == 8) {
#pragma unroll
    for (int j = 0; j < kLanes; ++j) {
      raw.word[2 * j] = __double2loint(v[j]);
      raw.word[2 * j + 1] = __double2hiint(v[j]);
    }
    put_sized<8>(raw, to, stride, n);
  }
}

// An operand's elements of one thread: where they begin, and the register that takes them.
struct Located {
  char* data;
  DType dtype;
  int64_t offset;
  int64_t stride;
  int slot;
};

__device__ __forceinline__ Located locate(const Matrix& matrix, int64_t row, int64_t column,
                                          int slot) {
  return {matrix.data, matrix.dtype, row * matrix.row + column * matrix.column, matrix.column,
          slot};
}

// Loads the first n elements of `count` operands, place(k) for operand k, two operands at a time so
// that their latencies overlap. Bit k of `read` says whether anything reads operand k.
template <class T, class PlaceOf>
__device__ __forceinline__ void load_all(const Registers<T>& registers, int count, uint32_t read,
                                         int n, PlaceOf place) {
#pragma unroll 1
  for (int k = 0; k < count; k += 2) {
    const bool wanted[] = {(read >> k & 1) != 0, k + 1 < count && (read >> k & 2) != 0};
    Raw<T> raw[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!wanted[i]) continue;
      const Located from = place(k + i);
      raw[i] = fetch<T>(from.data, from.dtype, from.offset, from.stride, n);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!wanted[i]) continue;
      const Located from = place(k + i);
      T v[kLanes];
      widen(v, raw[i], from.dtype);
      registers.write(from.slot, v);
    }
  }
}

}  // namespace fastffn::device
