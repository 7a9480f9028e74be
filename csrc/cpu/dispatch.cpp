// Which instruction set serves: the best that the processor has, unless FASTFFN_ISA names another.

#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastffn {
namespace {

struct Isa {
  const char* name;
  const Variant* variant;
};

// Those of this build that run on this processor, best first.
std::vector<Isa> find_runnable() {
  std::vector<Isa> found;
#ifdef FASTFFN_HAVE_X86_ISA
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("f16c");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (v4) found.push_back({"avx512", &avx512::variant});
  if (v3) found.push_back({"avx2", &avx2::variant});
#endif
  found.push_back({"baseline", &baseline::variant});
  return found;
}

const std::vector<Isa>& runnable() {
  static const std::vector<Isa> isas = find_runnable();
  return isas;
}

const Isa* find(std::string_view name) {
  std::string known;
  for (const Isa& isa : runnable()) {
    if (name == isa.name) return &isa;
    known += (known.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::invalid_argument("instruction set " + std::string(name) +
                              " does not run here; these do: " + known);
}

// Other threads may be inside a call, without Python's lock, while one selects.
std::atomic<const Isa*>& active() {
  static std::atomic<const Isa*> isa = [] {
    const char* wanted = std::getenv("FASTFFN_ISA");
    return wanted && *wanted ? find(wanted) : &runnable().front();
  }();
  return isa;
}

}  // namespace

void run_elementwise(const Elementwise& call) { active().load()->variant->elementwise(call); }

void run_summed_elementwise(const SummedElementwise& call) {
  active().load()->variant->summed_elementwise(call);
}

void run_residual_norm(const ResidualNormForward& call) {
  active().load()->variant->residual_norm(call);
}

void run_residual_norm_backward(const ResidualNormBackward& call) {
  active().load()->variant->residual_norm_backward(call);
}

void run_relation(const Relation& call) { active().load()->variant->relation(call); }

void run_attention(const Attention& call) { active().load()->variant->attention(call); }

void run_encoder(const Encoding& call) { active().load()->variant->encode(call); }

bool multiplies(Precision precision) {
  if (precision == Precision::kFloat) return true;
#ifdef FASTFFN_HAVE_X86_ISA
  return active().load()->variant == &avx512::variant &&
         (precision == Precision::kInt8 ? __builtin_cpu_supports("avx512vnni")
                                        : __builtin_cpu_supports("avx512bf16"));
#else
  return false;
#endif
}

void run_function(std::string_view name, const float* from, float* to, int64_t n) {
  if (!active().load()->variant->function(std::string(name).c_str(), from, to, n)) {
    throw std::invalid_argument("unknown function " + std::string(name));
  }
}

const char* active_isa() { return active().load()->name; }

std::vector<const char*> runnable_isas() {
  std::vector<const char*> names;
  for (const Isa& isa : runnable()) names.push_back(isa.name);
  return names;
}

void select_isa(std::string_view name) { active() = find(name); }

}  // namespace fastffn
