// One thread's memory. Included only by *.isa.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
template <class T>
using Memory = std::unique_ptr<T[], Free>;

// Aligned to the widest vectors, not initialised.
template <class T>
Memory<T> allocate(int64_t elements) {
  constexpr size_t kAlignment = 64;
  const size_t bytes = (elements * sizeof(T) / kAlignment + 1) * kAlignment;
  void* memory = std::aligned_alloc(kAlignment, bytes);
  if (!memory) throw std::bad_alloc();
  return Memory<T>(static_cast<T*>(memory));
}

// Cuts memory into pieces that are aligned to vectors.
template <class T>
class Arena {
 public:
  explicit Arena(T* memory) : next_(memory) {}
  static int64_t rounded(int64_t elements) { return (elements + 63) & -64; }
  T* take(int64_t elements) {
    T* taken = next_;
    next_ += rounded(elements);
    return taken;
  }

 private:
  T* next_;
};

}  // namespace
