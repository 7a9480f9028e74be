#include "program.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>

namespace fastffn {
namespace {

// Which opcodes the table gives a meaning: four a line, see fastffn/expr/primitives.py.
constexpr bool kKnown[] = {
#define BINARY(...) false, true, true, true,
#define UNARY(...) false, true, true, false,
#define GATED(...) true, true, true, true,
#define FUSED(...) false, true, false, false,
#include "primitives.def"
#undef BINARY
#undef UNARY
#undef GATED
#undef FUSED
};

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

// Little-endian 16-bit numbers, one after the other.
class Reader {
 public:
  explicit Reader(std::string_view bytes) : bytes_(bytes) {}

  uint16_t next() {
    require(bytes_.size() >= 2, "program: the bytes end too early");
    const auto low = static_cast<uint8_t>(bytes_[0]), high = static_cast<uint8_t>(bytes_[1]);
    bytes_.remove_prefix(2);
    return static_cast<uint16_t>(low | high << 8);
  }

  bool done() const { return bytes_.empty(); }

 private:
  std::string_view bytes_;
};

}  // namespace

Program::Program(std::string_view packed) {
  Reader reader(packed);
  const uint16_t inputs = reader.next(), outputs = reader.next(), registers = reader.next();
  require(inputs >= 1 && outputs >= 1 && registers >= inputs, "program: bad header");
  instructions_.resize(reader.next());
  for (Instruction& instruction : instructions_) {
    instruction.opcode = reader.next();
    instruction.target = reader.next();
    require(instruction.opcode < std::size(kKnown) && kKnown[instruction.opcode],
            "program: unknown opcode");
    require(instruction.target >= inputs && instruction.target < registers,
            "program: bad target register");
    for (uint16_t& source : instruction.source) {
      source = reader.next();
      require(source < registers, "program: bad source register");
    }
  }
  std::vector<bool> written(registers);
  std::fill_n(written.begin(), inputs, true);
  for (const Instruction& instruction : instructions_) {
    for (const uint16_t source : instruction.source) {
      require(written[source], "program: a register is read before it is written");
    }
    written[instruction.target] = true;
  }
  for (int i = 0; i < outputs; ++i) {
    results_.push_back(reader.next());
    require(results_.back() < registers && written[results_.back()],
            "program: bad output register");
  }
  require(reader.done(), "program: bytes are left over");
  code_ = {inputs,
           outputs,
           registers,
           static_cast<int>(instructions_.size()),
           instructions_.data(),
           results_.data()};
}

}  // namespace fastffn
