#include "program.h"

#include <stdexcept>

namespace fastffn {
namespace {

constexpr uint16_t kOpcodes = 0
#define BINARY(...) +4
#define UNARY(...) +4
#define GATED(...) +4
#define FUSED(...) +4
#include "primitives.def"
#undef BINARY
#undef UNARY
#undef GATED
#undef FUSED
    ;

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
    require(instruction.opcode < kOpcodes, "program: unknown opcode");
    require(instruction.target >= inputs && instruction.target < registers,
            "program: bad target register");
    for (uint16_t& source : instruction.source) {
      source = reader.next();
      require(source < registers, "program: bad source register");
    }
  }
  for (int i = 0; i < outputs; ++i) {
    results_.push_back(reader.next());
    require(results_.back() < registers, "program: bad output register");
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
