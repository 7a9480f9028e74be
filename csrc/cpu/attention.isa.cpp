// The attention kernel (csrc/attention.h) on the OpenMP threads, compiled once per instruction set.
// A row of the result is computed by one thread, in an order that only its own sequence decides,
// so results do not depend on the threads.

#include "../attention.h"

#include <omp.h>

#include <vector>

#include "attention.h"
#include "dispatch.h"

namespace {

using fastffn::Attention;
using fastffn::HeadRows;

constexpr int64_t kTasksPerThread = 4;  // fewer, and threads wait for each other

// Some queries of a head of a sequence.
struct Task {
  int64_t sequence;
  int64_t head;
  int64_t first, last;
};

// Heads, and of few heads parts of their queries too, although each part packs its head again.
std::vector<Task> tasks_of(const Attention& call, int64_t threads) {
  int64_t sequences = 0;
  for (int64_t s = 0; s < call.sequences; ++s) sequences += call.starts[s + 1] > call.starts[s];
  const int64_t heads = std::max<int64_t>(1, sequences * call.heads);
  const int64_t wanted = threads == 1 ? 1 : (threads * kTasksPerThread + heads - 1) / heads;
  std::vector<Task> tasks;
  for (int64_t s = 0; s < call.sequences; ++s) {
    const int64_t length = call.starts[s + 1] - call.starts[s];
    const int64_t blocks = (length + kBlockQueries - 1) / kBlockQueries;
    const int64_t parts = std::min(wanted, blocks);
    for (int64_t head = 0; head < call.heads; ++head)
      for (int64_t part = 0; part < parts; ++part)
        tasks.push_back({s, head, length * part / parts, length * (part + 1) / parts});
  }
  return tasks;
}

template <class In>
void run_task(const Attention& call, const Task& task, float* workspace) {
  const auto at = [&](const HeadRows& x, int64_t row) {
    return reinterpret_cast<In*>(x.data) + row * x.row + task.head * call.head_size;
  };
  const int64_t begin = call.starts[task.sequence], end = call.starts[task.sequence + 1];
  const float* bias = call.bias;
  if (bias) bias += task.head * call.bias_stride[0] + task.first * call.bias_stride[1];
  attend<In>(at(call.query, begin + task.first), call.query.row, at(call.key, begin), call.key.row,
             at(call.value, begin), call.value.row, bias, call.bias_stride[1],
             at(call.out, begin + task.first), call.out.row, task.last - task.first, end - begin,
             call.head_size, call.scale, workspace);
}

}  // namespace

namespace fastffn::FASTFFN_ISA {

void attention(const Attention& call) {
  int64_t longest = 0, work = 0;
  for (int64_t s = 0; s < call.sequences; ++s) {
    const int64_t length = call.starts[s + 1] - call.starts[s];
    longest = std::max(longest, length);
    work += length * length * call.heads;
  }
  if (!work) return;
  int64_t threads = work >= kSerialElements ? omp_get_max_threads() : 1;
  const std::vector<Task> tasks = tasks_of(call, threads);
  const int64_t count = tasks.size();
  threads = std::min(threads, count);
  // One piece of memory for all: what is not to be had must be noticed here, before the threads.
  const int64_t size = Arena<float>::rounded(attend_workspace(longest, call.head_size));
  const Memory<float> memory = allocate<float>(threads * size);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) {
    float* workspace = memory.get() + omp_get_thread_num() * size;
    if (call.dtype == DType::kBFloat16)
      run_task<bfloat16>(call, tasks[i], workspace);
    else
      run_task<float>(call, tasks[i], workspace);
  }
}

}  // namespace fastffn::FASTFFN_ISA
