// The CUDA interpreter of Programs: entry points. Any gene runs without compilation, and nothing is
// allocated, copied from the host or waited for, so that a CUDA graph captures every call.
//
// Each function launches one kernel on a stream and returns. They throw std::runtime_error, and
// nothing is launched, where a program is too long for a kernel's parameters or has more registers
// than a block's shared memory holds (the caller then takes another way), and where CUDA reports an
// error.
#pragma once

#include <cstdint>
#include <string>

#include "../elementwise.h"
#include "../residual_norm.h"

namespace fastffn {

struct Place {
  int device;
  uintptr_t stream;  // a cudaStream_t
};

// Routines (routine.h) in device memory that stand for the call's programs, whose numbers of inputs
// and outputs they have: a captured graph then replays for whatever is written there. Addresses are
// multiples of 16; 0: the call's own program.
struct DeviceRoutines {
  uintptr_t program;
  uintptr_t gradient;  // of the row kernel's backward
  int registers;       // the most that any routine written there has
};

// Whether every function here takes the program, in any type on any device.
bool cuda_takes(const Code& code);

void cuda_elementwise(const Elementwise& call, const Place& place);
void cuda_summed_elementwise(const SummedElementwise& call, const DeviceRoutines& routines,
                             const Place& place);
void cuda_residual_norm(const ResidualNormForward& call, const DeviceRoutines& routines,
                        const Place& place);
void cuda_residual_norm_backward(const ResidualNormBackward& call, const DeviceRoutines& routines,
                                 const Place& place);

// The bytes of a Routine, to be written into device memory. In cuda_summed_elementwise, columns
// from `width` on (-1: none) are not computed but stored as 0. Throws std::runtime_error if the
// program is longer than a Routine or has more than `registers`.
std::string cuda_routine(const Code& code, int registers, int64_t width);

}  // namespace fastffn
