// One call of the attention kernel, for inference: of each head of each sequence,
//
//   out = softmax(scale Q K^T + bias) V
//
// Sequences lie one after the other in the rows of one matrix, without padding, so nothing is
// masked. Computed in float.
#pragma once

#include <cstdint>

#include "elementwise.h"

namespace fastffn {

constexpr int64_t kMaxHeadSize = 256;

// [tokens, heads * head_size]; head h has the columns from h * head_size on, next to each other in
// memory. Rows are `row` elements apart.
struct HeadRows {
  char* data;
  int64_t row;
};

struct Attention {
  DType dtype;  // of all four: float32 or bfloat16
  HeadRows query;
  HeadRows key;
  HeadRows value;
  HeadRows out;  // written; may be query itself
  int64_t heads;
  int64_t head_size;      // up to kMaxHeadSize
  const int64_t* starts;  // [sequences + 1], rising from 0 to the number of tokens
  int64_t sequences;
  float scale;
  // [heads, length, length] with strides of the first two; length: of the longest sequence, at
  // least. Shorter ones take its first rows and columns. Null: none.
  const float* bias;
  int64_t bias_stride[2];
};

}  // namespace fastffn
