// The CPU kernels: entry points, and the variants that dispatch.cpp chooses from.
#pragma once

#include <string_view>
#include <vector>

#include "../attention.h"
#include "../elementwise.h"
#include "../encoder.h"
#include "../relation.h"
#include "../residual_norm.h"

namespace fastffn {

// Run one call on the OpenMP threads; the instruction set is chosen at the first call.
void run_elementwise(const Elementwise& call);
void run_summed_elementwise(const SummedElementwise& call);
void run_residual_norm(const ResidualNormForward& call);
void run_residual_norm_backward(const ResidualNormBackward& call);
void run_relation(const Relation& call);
void run_attention(const Attention& call);
void run_encoder(const Encoding& call);

// Whether products of such numbers run with the instruction set in use.
bool multiplies(Precision precision);

// Name of the instruction set in use, and of all that this build holds and this processor runs.
const char* active_isa();
std::vector<const char*> runnable_isas();

// Uses the named one from now on; throws std::invalid_argument if it is not runnable here.
void select_isa(std::string_view name);

// Applies one of cpu/math.h's fp32 functions ("exp", "expm1", "tanh", "erf", "sigmoid") to n
// numbers, for the tests of their accuracy; throws std::invalid_argument for another name.
void run_function(std::string_view name, const float* from, float* to, int64_t n);

// What one instruction set offers, from the *.isa.cpp.
struct Variant {
  void (*elementwise)(const Elementwise& call);
  void (*summed_elementwise)(const SummedElementwise& call);
  void (*residual_norm)(const ResidualNormForward& call);
  void (*residual_norm_backward)(const ResidualNormBackward& call);
  void (*relation)(const Relation& call);
  void (*attention)(const Attention& call);
  void (*encode)(const Encoding& call);
  bool (*function)(const char* name, const float* from, float* to, int64_t n);
};
namespace baseline {
extern const Variant variant;
}
#ifdef FASTFFN_HAVE_X86_ISA
namespace avx2 {
extern const Variant variant;
}
namespace avx512 {
extern const Variant variant;
}
#endif

}  // namespace fastffn
