// Counter-based random numbers (Philox4x32, Salmon et al., SC 2011): the numbers of an element are
// a function of the seed and of its place alone, so that forward and backward agree without a
// stored mask, and a seed gives the same mask on any number of threads and on any device.
//
// One call serves eight neighbouring columns of a row with 16 bits each: column c of row r takes
// half (c % 8) % 2 of word (c % 8) / 2 of the call with the counter (c / 8, low r, high r, 0). An
// element is dropped if its 16 bits are below a threshold. Seven rounds are the fewest that pass
// BigCrush.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTFFN_INLINE __host__ __device__ __forceinline__
#else
#define FASTFFN_INLINE inline
#endif

namespace fastffn {

constexpr int kPhiloxRounds = 7;
constexpr int kPhiloxColumns = 8;  // that one call serves

// Turns the counter w[0..3] into four random words.
FASTFFN_INLINE void philox(uint32_t (&w)[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * w[0], b = uint64_t{0xCD9E8D57u} * w[2];
    w[0] = static_cast<uint32_t>(b >> 32) ^ w[1] ^ key0;
    w[1] = static_cast<uint32_t>(b);
    w[2] = static_cast<uint32_t>(a >> 32) ^ w[3] ^ key1;
    w[3] = static_cast<uint32_t>(a);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// Dropout of a call: an element is kept with probability 1 - threshold / 65536 and then scaled.
struct Dropout {
  uint32_t threshold;     // 0: no dropout, and no seed is read
  const uint64_t* seed;   // in the memory of the device that computes
  int64_t first_row = 0;  // row 0 of the call is this row of the mask

  FASTFFN_INLINE double scale() const { return 65536.0 / (65536 - static_cast<int>(threshold)); }
};

}  // namespace fastffn
