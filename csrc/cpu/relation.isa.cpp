// The relation kernel (csrc/relation.h), compiled once per instruction set. A head of an
// example is computed by one thread and the losses of the heads are added in order, so results do
// not depend on the threads.

#include "../relation.h"

#include <omp.h>

#include <vector>

#include "arena.h"
#include "relation_scores.h"
#include "relation_softmax.h"
#include "relation_symmetric.h"

namespace {

using fastffn::Relation;

// A task is some neighbouring heads, about so many columns of the student: packed together, whole
// cache lines are read and written.
constexpr int64_t kTaskColumns = 32;
constexpr int64_t kTasksPerThread = 8;  // fewer, and threads wait for each other

int64_t heads_per_task(const Relation& call, int64_t threads) {
  int64_t heads = std::clamp<int64_t>(kTaskColumns / std::max<int64_t>(1, call.width), 1, 8);
  while (heads > 1 && call.batch * call.heads < kTasksPerThread * threads * heads) heads /= 2;
  return heads;
}

// Which tokens of the examples are real.
class RealRows {
 public:
  explicit RealRows(const Relation& call)
      : length_(call.length), index_(call.batch * call.length), counts_(call.batch) {
    for (int64_t example = 0; example < call.batch; ++example) {
      const uint8_t* real = call.real + (call.real ? example * call.real_stride[0] : 0);
      for (int64_t row = 0; row < call.length; ++row)
        if (!call.real || real[row * call.real_stride[1]])
          index_[example * length_ + counts_[example]++] = static_cast<int32_t>(row);
    }
  }

  template <class T>
  RealTokens of(int64_t example) const {
    const int64_t count = counts_[example];
    return {&index_[example * length_], count, (count + kWidth<T> - 1) / kWidth<T>};
  }

  int64_t most() const { return *std::max_element(counts_.begin(), counts_.end()); }

 private:
  const int64_t length_;
  std::vector<int32_t> index_;
  std::vector<int64_t> counts_;
};

// One thread's memory, and the way of some heads through it.
template <class T>
class Worker {
  static constexpr int W = kWidth<T>;

 public:
  Worker(const Relation& call, const RealRows& real, int64_t heads)
      : call_(call),
        real_(real),
        heads_(heads),
        self_(call.is_self()),
        symmetric_(self_ && call.divergence == Divergence::kKl),
        panels_((real.most() + W - 1) / W),
        memory_(allocate<T>(size())) {
    Arena<T> arena(memory_.get());
    a_ = arena.take(student_size());
    b_ = self_ ? a_ : arena.take(student_size());
    teacher_a_ = arena.take(teacher_size());
    teacher_b_ = self_ ? teacher_a_ : arena.take(teacher_size());
    da_ = call.da.data ? arena.take(student_size()) : nullptr;
    db_ = self_ ? da_ : call.db.data ? arena.take(student_size()) : nullptr;
    weights_ = arena.take(panels_ * W);
    values_ = arena.take(panels_ * W);
    scratch_ = arena.take(scratch_size<T>(panels_, symmetric_));
  }

  // Heads [first, last); losses[head] is the weighted sum of a head's values.
  void run(int64_t example, int64_t first, int64_t last, double* losses) {
    const RealTokens real = real_.of<T>(example);
    for (int64_t head = first; head < last; ++head) clear_padding(example, head, real);
    if (real.count == 0) return;
    // Scores are computed to base 2 where they are exponents. A relation with itself has the factor
    // in halves on both sides.
    const double base = call_.divergence == Divergence::kScoreMse ? 1 : kLog2E;
    const double factor = split(call_.scale * base);
    const double teacher_factor = split(call_.teacher_scale * base);
    const Columns columns{first * call_.width, (last - first) * call_.width};
    const Columns teacher{first * call_.teacher_width, (last - first) * call_.teacher_width};
    pack_columns(call_.a, example, real, columns, call_.width, factor, a_);
    pack_columns(call_.teacher_a, example, real, teacher, call_.teacher_width, teacher_factor,
                 teacher_a_);
    if (!self_) {
      const bool one_teacher = !call_.teacher_b.data, one_student = !call_.b.data;
      pack_columns(one_student ? call_.a : call_.b, example, real, columns, call_.width, 1, b_);
      pack_columns(one_teacher ? call_.teacher_a : call_.teacher_b, example, real, teacher,
                   call_.teacher_width, 1, teacher_b_);
    }
    for (T* gradient : {da_, db_})
      if (gradient) std::fill_n(gradient, real.panels * panel_size<T>(columns.count), T(0));

    for (int64_t head = first; head < last; ++head) {
      pack_weights(example, head, real);
      const int64_t at = (head - first) * call_.width * W;
      const int64_t teacher_at = (head - first) * call_.teacher_width * W;
      const Head<T> work{
          .tokens = real.count,
          .panels = real.panels,
          .width = call_.width,
          .teacher_width = call_.teacher_width,
          .stride = panel_size<T>(columns.count),
          .teacher_stride = panel_size<T>(teacher.count),
          .a = a_ + at,
          .b = b_ + at,
          .teacher_a = teacher_a_ + teacher_at,
          .teacher_b = teacher_b_ + teacher_at,
          .weights = weights_,
          .values = values_,
          .da = da_ ? da_ + at : nullptr,
          .db = db_ ? db_ + at : nullptr,
          .scratch = scratch_,
      };
      if (!symmetric_ || !symmetric_kl<T>(work)) compute(work);
      losses[head - first] = finish(example, head, real);
    }

    if (da_)
      unpack_columns(da_, call_.scale / (self_ ? factor : 1), real, columns, call_.da, example);
    if (db_ && !self_) unpack_columns(db_, call_.scale / factor, real, columns, call_.db, example);
  }

 private:
  struct Columns {
    int64_t first;
    int64_t count;
  };

  int64_t student_size() const { return panels_ * panel_size<T>(call_.width * heads_); }
  int64_t teacher_size() const { return panels_ * panel_size<T>(call_.teacher_width * heads_); }
  int64_t size() const {
    using A = Arena<T>;
    return 4 * A::rounded(student_size()) + 2 * A::rounded(teacher_size()) +
           2 * A::rounded(panels_ * W) + A::rounded(scratch_size<T>(panels_, symmetric_));
  }

  void compute(const Head<T>& head) const {
    switch (call_.divergence) {
      case Divergence::kKl:
        return SoftmaxRelation<T, Divergence::kKl>(head).run();
      case Divergence::kReverseKl:
        return SoftmaxRelation<T, Divergence::kReverseKl>(head).run();
      case Divergence::kProbabilityMse:
        return SoftmaxRelation<T, Divergence::kProbabilityMse>(head).run();
      case Divergence::kScoreMse:
        return ScoreMse<T>{head}.run();
    }
  }

  double split(double factor) const { return self_ ? std::sqrt(factor) : factor; }

  void pack_columns(const Tokens& x, int64_t example, const RealTokens& real, Columns columns,
                    int64_t width, double factor, T* panels) const {
    pack<T>(x, example, real, columns.first, columns.count, call_.heads * width,
            static_cast<T>(factor), panels);
  }

  void unpack_columns(const T* panels, double factor, const RealTokens& real, Columns columns,
                      const Tokens& x, int64_t example) const {
    unpack<T>(panels, static_cast<T>(factor), real, columns.first, columns.count, x, example);
  }

  void pack_weights(int64_t example, int64_t head, const RealTokens& real) {
    std::fill_n(weights_, real.panels * W, T(0));
    if (!call_.weights) return;
    const T* from = reinterpret_cast<const T*>(call_.weights) + example * call_.weights_stride[0] +
                    head * call_.weights_stride[1];
    for (int64_t i = 0; i < real.count; ++i)
      weights_[i] = from[real.index[i] * call_.weights_stride[2]];
  }

  T* rows(int64_t example, int64_t head) const {
    return reinterpret_cast<T*>(call_.rows) + (example * call_.heads + head) * call_.length;
  }

  // Zeros where nothing else will be written.
  void clear_padding(int64_t example, int64_t head, const RealTokens& real) const {
    if (real.count == call_.length) return;
    if (call_.rows) std::fill_n(rows(example, head), call_.length, T(0));
    for (const Tokens* gradient : {&call_.da, &call_.db}) {
      if (!gradient->data) continue;
      int64_t next = 0;
      for (int64_t row = 0; row < call_.length; ++row) {
        if (next < real.count && real.index[next] == row) {
          ++next;
          continue;
        }
        const int64_t offset =
            example * gradient->batch + row * gradient->row + head * call_.width * gradient->column;
        const int64_t size = gradient->dtype == DType::kFloat64   ? 8
                             : gradient->dtype == DType::kFloat32 ? 4
                                                                  : 2;
        for (int64_t k = 0; k < call_.width; ++k)  // zero is zero bits in every format
          std::memset(gradient->data + (offset + k * gradient->column) * size, 0, size);
      }
    }
  }

  double finish(int64_t example, int64_t head, const RealTokens& real) const {
    if (call_.rows) {
      T* to = rows(example, head);
      for (int64_t i = 0; i < real.count; ++i) to[real.index[i]] = values_[i];
    }
    double sum = 0;
    if (call_.loss)
      for (int64_t i = 0; i < real.count; ++i)
        sum += static_cast<double>(weights_[i]) * static_cast<double>(values_[i]);
    return sum;
  }

  const Relation& call_;
  const RealRows& real_;
  const int64_t heads_;
  const bool self_;
  const bool symmetric_;
  const int64_t panels_;
  Memory<T> memory_;
  T *a_, *b_, *teacher_a_, *teacher_b_, *da_, *db_, *weights_, *values_, *scratch_;
};

template <class T>
void run(const Relation& call) {
  double loss = 0;
  if (call.batch && call.heads && call.length) {
    const RealRows real(call);
    std::vector<double> losses(call.batch * call.heads);
    const int64_t work = call.batch * call.heads * call.length * call.length;
    const int64_t threads = work >= kSerialElements ? omp_get_max_threads() : 1;
    const int64_t heads = heads_per_task(call, threads);
    const int64_t groups = (call.heads + heads - 1) / heads;
    // Memory that is not to be had must be noticed here: nothing may be thrown inside.
    std::vector<Worker<T>> workers;
    workers.reserve(threads);
    for (int64_t k = 0; k < threads; ++k) workers.emplace_back(call, real, heads);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t task = 0; task < call.batch * groups; ++task) {
      const int64_t example = task / groups, first = task % groups * heads;
      workers[omp_get_thread_num()].run(example, first, std::min(call.heads, first + heads),
                                        &losses[example * call.heads + first]);
    }
    for (const double one : losses) loss += one;
  }
  if (call.loss) *reinterpret_cast<T*>(call.loss) = static_cast<T>(loss);
}

}  // namespace

namespace fastffn::FASTFFN_ISA {

void relation(const Relation& call) { call.in_double ? run<double>(call) : run<float>(call); }

}  // namespace fastffn::FASTFFN_ISA
