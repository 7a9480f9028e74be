// A Program as the CUDA kernels read it: plain data of a fixed size, which goes to a kernel by
// value among its parameters, or lies in device memory.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../elementwise.h"

namespace fastffn {

// Two routines and the operands of the row kernel fit the 4 KB of a kernel's parameters.
constexpr int kMaxSteps = 144;

// With so many registers in double, a warp of the row kernel fits the smallest shared memory of a
// block (163 KB, sm_80).
constexpr int kSafeRegisters = 64;

// One instruction in 8 bytes.
struct alignas(8) Step {
  uint8_t opcode;
  uint8_t target;
  uint8_t source[3];
};

struct alignas(16) Routine {
  int32_t inputs;
  int32_t outputs;
  int32_t registers;
  int32_t length;
  int64_t width;  // columns from here on are stored as 0; -1: there are none
  uint32_t read;  // bit k: input k is read at all
  uint8_t results[kMaxOperands];
  Step steps[kMaxSteps];
};

// The routine of a call: by value, or in device memory.
struct RoutineSource {
  Routine value;
  const Routine* address;  // null: `value`
  int registers;           // of the routine, at most
};

// Throws std::runtime_error if the program is too long.
inline Routine make_routine(const Code& code) {
  if (code.length > kMaxSteps)
    throw std::runtime_error("CUDA interpreter: " + std::to_string(code.length) +
                             " instructions, more than the " + std::to_string(kMaxSteps) +
                             " that it takes");
  static_assert(kMaxRegisters <= 256, "a register's number is a byte");
  Routine routine{};
  routine.inputs = code.inputs;
  routine.outputs = code.outputs;
  routine.registers = code.registers;
  routine.length = code.length;
  routine.width = -1;
  const auto mark = [&](int reg) {
    if (reg < code.inputs) routine.read |= 1u << reg;
  };
  for (int i = 0; i < code.length; ++i) {
    const Instruction& from = code.instructions[i];
    Step& to = routine.steps[i];
    to.opcode = static_cast<uint8_t>(from.opcode);
    to.target = static_cast<uint8_t>(from.target);
    for (int s = 0; s < 3; ++s) {
      to.source[s] = static_cast<uint8_t>(from.source[s]);
      mark(from.source[s]);
    }
  }
  for (int k = 0; k < code.outputs; ++k) {
    routine.results[k] = static_cast<uint8_t>(code.results[k]);
    mark(code.results[k]);
  }
  return routine;
}

// `address` and `registers` as in DeviceRoutines.
inline RoutineSource routine_source(const Code& code, uintptr_t address, int registers) {
  if (address) return {{}, reinterpret_cast<const Routine*>(address), registers};
  return {make_routine(code), nullptr, code.registers};
}

}  // namespace fastffn
