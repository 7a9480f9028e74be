// The CPU interpreter of Programs: entry point, and the variants that dispatch.cpp chooses from.
#pragma once

#include <string_view>
#include <vector>

#include "../elementwise.h"

namespace fastffn {

// Runs one elementwise call on the OpenMP threads; the instruction set is chosen at the first call.
void run_elementwise(const Elementwise& call);

// Name of the instruction set in use, and of all that this build holds and this processor runs.
const char* active_isa();
std::vector<const char*> runnable_isas();

// Uses the named one from now on; throws std::invalid_argument if it is not runnable here.
void select_isa(std::string_view name);

// One per instruction set, from interpreter.isa.cpp.
namespace baseline {
void run_elementwise(const Elementwise& call);
}
#ifdef FASTFFN_HAVE_X86_ISA
namespace avx2 {
void run_elementwise(const Elementwise& call);
}
namespace avx512 {
void run_elementwise(const Elementwise& call);
}
#endif

}  // namespace fastffn
