// Which instruction set serves: the best that the processor has, unless FASTFFN_ISA in the
// environment names another.

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "interpreter.h"

namespace fastffn {
namespace {

struct Isa {
  const char* name;
  bool runnable;
  const Variant* variant;
};

// Best first.
std::vector<Isa> isas() {
  std::vector<Isa> found;
#ifdef FASTFFN_HAVE_X86_ISA
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
  found.push_back({"avx512", avx512, &avx512::variant});
  found.push_back({"avx2", avx2, &avx2::variant});
#endif
  found.push_back({"baseline", true, &baseline::variant});
  return found;
}

Isa find(std::string_view name) {
  for (const Isa& isa : isas()) {
    if (name == isa.name && isa.runnable) return isa;
  }
  throw std::invalid_argument("instruction set " + std::string(name) + " does not run here");
}

Isa choose() {
  if (const char* wanted = std::getenv("FASTFFN_ISA")) return find(wanted);
  for (const Isa& isa : isas()) {
    if (isa.runnable) return isa;
  }
  throw std::logic_error("the baseline always runs");
}

Isa& active() {
  static Isa isa = choose();
  return isa;
}

}  // namespace

void run_elementwise(const Elementwise& call) { active().variant->elementwise(call); }

void run_function(std::string_view name, const float* from, float* to, int64_t n) {
  if (!active().variant->function(std::string(name).c_str(), from, to, n)) {
    throw std::invalid_argument("unknown function " + std::string(name));
  }
}

const char* active_isa() { return active().name; }

std::vector<const char*> runnable_isas() {
  std::vector<const char*> names;
  for (const Isa& isa : isas()) {
    if (isa.runnable) names.push_back(isa.name);
  }
  return names;
}

void select_isa(std::string_view name) { active() = find(name); }

}  // namespace fastffn
