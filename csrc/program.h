// A Program as the interpreters run it: parsed from the bytes of fastffn/expr/program.py
// (Program.packed) and checked once, so that the inner loops need no checks.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace fastffn {

struct Instruction {
  uint16_t opcode;
  uint16_t target;
  uint16_t source[3];
};

// What an interpreter reads: plain pointers into a Program.
struct Code {
  int inputs;
  int outputs;
  int registers;  // the first `inputs` of them are the inputs and are never written
  int length;
  const Instruction* instructions;
  const uint16_t* results;  // register of each output
};

class Program {
 public:
  // Throws std::invalid_argument if the bytes are no program.
  explicit Program(std::string_view packed);
  Program(const Program&) = delete;

  const Code& code() const { return code_; }

 private:
  std::vector<Instruction> instructions_;
  std::vector<uint16_t> results_;
  Code code_;
};

}  // namespace fastffn
