// One call of the relation kernel: how far a student's token-to-token maps are from a teacher's,
// head by head and query by query, and the gradient of a weighted sum of these values.
//
//   S_ij = scale a_i . b_j        T_ij = teacher_scale ta_i . tb_j         i, j: real tokens
//   R = softmax_j(S)              P = softmax_j(T)
//
// No length x length map is kept: memory is linear in the length. The computation is in float, or
// in double if an operand is double.
#pragma once

#include <cstdint>

#include "elementwise.h"

namespace fastffn {

// The value of a query, in nats where there are logarithms.
enum class Divergence : int32_t {
  kKl,              // sum_j P (log P - log R)
  kReverseKl,       // sum_j R (log R - log P)
  kProbabilityMse,  // sum_j (R - P)^2
  kScoreMse,        // sum_j (S - T)^2
};

// [batch, length, width] with strides in elements. data null: absent.
struct Tokens {
  char* data;
  DType dtype;
  int64_t batch;
  int64_t row;
  int64_t column;
};

struct Relation {
  int64_t batch;
  int64_t length;
  int64_t heads;
  int64_t width;  // of one head
  int64_t teacher_width;
  Tokens a;
  Tokens b;  // absent: a, the relation is one of a with itself
  Tokens teacher_a;
  Tokens teacher_b;     // absent: teacher_a
  const uint8_t* real;  // [batch, length] with strides; null: all tokens are real
  int64_t real_stride[2];
  double scale;
  double teacher_scale;
  Divergence divergence;
  // Of each query, [batch, heads, length] in the compute type, strides in elements. Null if neither
  // the loss nor a gradient is wanted.
  const char* weights;
  int64_t weights_stride[3];
  bool in_double;

  // Written, each unless null. At padding: 0.
  char* rows;  // the values, [batch, heads, length] contiguous, in the compute type
  char* loss;  // sum of weights * values, one number of the compute type
  Tokens da;   // gradient of that sum; of a self relation in full
  Tokens db;

  bool is_self() const { return !b.data && !teacher_b.data; }
};

}  // namespace fastffn
