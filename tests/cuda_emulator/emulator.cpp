// Runs a kernel's threads as fibers. A warp goes on until all of it waits for others; then the next
// one runs, in the order given or in its reverse, so that a missing barrier shows as a wrong result
// in one of the two. Shared memory starts as NaN in every block, and what is written past its end
// is an error, as is a barrier that not all threads reach.

#include "emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace fastffn {
uint4 shared_memory[emulator::kSharedLimit / 16 + 64];
}

namespace emulator {
namespace {

constexpr size_t kStack = 128 * 1024;
constexpr int kWarp = 32;
constexpr unsigned char kPoison = 0xff, kGuard = 0xa5;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done;
};

// Threads that wait for each other: a whole block or a warp.
struct Gate {
  int size, arrived;
  unsigned generation;
};

std::vector<Fiber> fibers;
std::vector<Gate> warps;
std::vector<uint64_t> given[2];  // by parity of the generation: a fast lane may be one ahead
Gate block;
ucontext_t scheduler;
unsigned current;
bool progress;
bool reverse_order = false;
std::string message;
void (*kernel)(void*);
void* kernel_argument;

void pass(Gate& gate) {
  const unsigned mine = gate.generation;
  progress = true;
  if (++gate.arrived == gate.size) {
    gate.arrived = 0;
    ++gate.generation;
    return;
  }
  while (gate.generation == mine) swapcontext(&fibers[current].context, &scheduler);
}

void enter() {
  kernel(kernel_argument);
  fibers[current].done = true;
  progress = true;
}

bool run_block(unsigned threads) {
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    getcontext(&fiber.context);
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    fiber.done = false;
    makecontext(&fiber.context, enter, 0);
  }
  // Each warp goes as far as it can before the next one starts.
  const unsigned count = static_cast<unsigned>(warps.size());
  for (unsigned left = threads; left > 0;) {
    bool any = false;
    for (unsigned w = 0; w < count; ++w) {
      const unsigned first = (reverse_order ? count - 1 - w : w) * kWarp;
      const unsigned lanes = std::min<unsigned>(kWarp, threads - first);
      do {
        progress = false;
        for (unsigned i = 0; i < lanes; ++i) {
          current = first + (reverse_order ? lanes - 1 - i : i);
          if (fibers[current].done) continue;
          threadIdx = dim3(current);
          swapcontext(&scheduler, &fibers[current].context);
          left -= fibers[current].done;
        }
        any |= progress;
      } while (progress);
    }
    if (!any) return false;
  }
  return true;
}

}  // namespace

void block_barrier() {
  pass(block);
  threadIdx = dim3(current);
}

uint64_t exchange(uint64_t mine, int lane) {
  const unsigned warp = current / kWarp;
  std::vector<uint64_t>& values = given[warps[warp].generation % 2];
  values[current] = mine;
  pass(warps[warp]);
  threadIdx = dim3(current);
  return values[warp * kWarp + lane];
}

const char* last_message() { return message.c_str(); }

void set_reverse_order(bool reverse) { reverse_order = reverse; }

cudaError_t run(const cudaLaunchConfig_t& config, void (*body)(void*), void* argument) {
  const auto fail = [](const char* what) {
    message = what;
    return cudaErrorLaunchFailure;
  };
  const unsigned threads = config.blockDim.x;
  if (threads == 0 || threads > 1024 || config.gridDim.x == 0 ||
      config.dynamicSmemBytes > kSharedLimit)
    return cudaErrorInvalidValue;
  kernel = body;
  kernel_argument = argument;
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  if (fibers.size() < threads) fibers.resize(threads);
  for (auto& values : given) values.assign((threads + kWarp - 1) / kWarp * kWarp, 0);
  char* shared = reinterpret_cast<char*>(fastffn::shared_memory);
  const size_t all = sizeof(fastffn::shared_memory), used = config.dynamicSmemBytes;
  for (unsigned b = 0; b < config.gridDim.x; ++b) {
    blockIdx = dim3(b);
    block = {static_cast<int>(threads), 0, 0};
    warps.clear();
    for (unsigned t = 0; t < threads; t += kWarp)
      warps.push_back({static_cast<int>(threads - t < kWarp ? threads - t : kWarp), 0, 0});
    std::memset(shared, kPoison, used);
    std::memset(shared + used, kGuard, all - used);
    if (!run_block(threads)) return fail("not all threads reach a barrier");
    for (size_t i = used; i < all; ++i)
      if (static_cast<unsigned char>(shared[i]) != kGuard)
        return fail("shared memory is written past its end");
  }
  return cudaSuccess;
}

}  // namespace emulator
