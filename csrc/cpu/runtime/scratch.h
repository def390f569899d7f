// Scratch of a kernel. A Workspace lies on the heap and belongs to one thread, or to one call whose threads share it:
// what it holds is written down once, counted, allocated and handed out. Scratch is torch's memory: large buffers of a
// whole call, on huge pages.
#pragma once

#include <cstdint>
#include <memory>

#include "cpu/runtime/tensors.h"

namespace fastkd {

// The next multiple of a cache line; vectors that straddle two lines cost twice.
template <class T>
T* aligned(T* x) {
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(x) + 63) & ~uintptr_t(63));
}

// Consecutive aligned pieces of one allocation; without memory it only counts.
struct Arena {
  char* base = nullptr;
  int64_t used = 0;

  template <class T>
  T* piece(int64_t count) {
    T* place = reinterpret_cast<T*>(base + used);
    used += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return place;
  }
};

struct Workspace {
  std::unique_ptr<char[]> bytes;

  Workspace() = default;
  explicit Workspace(int64_t size) : bytes(new char[size + 64]) {}
  char* get() const { return aligned(bytes.get()); }

  // lay_out(arena) runs twice: first the pieces are counted, then they are handed out.
  template <class F>
  void allocate(const F& lay_out) {
    Arena counted;
    lay_out(counted);
    *this = Workspace(counted.used);
    Arena arena = {get(), 0};
    lay_out(arena);
  }
};

struct Scratch {
  Tensor tensor;

  Scratch() = default;
  Scratch(const Tensor& like, int64_t bytes)
      : tensor(torch::stable::new_empty(like, {bytes / 4 + 32}, ScalarType::Float)) {
    use_huge_pages(tensor);
  }
  char* get() const { return reinterpret_cast<char*>(floats()); }
  float* floats() const { return aligned(tensor.mutable_data_ptr<float>()); }
};

}  // namespace fastkd
