// Scratch memory of a kernel: what it needs is written down once, counted, allocated and handed out.
#pragma once

#include <cstdint>
#include <memory>

namespace fastkd {

// Consecutive aligned pieces of one allocation; with no memory it only counts.
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

// Scratch of one thread, or shared by all.
struct Workspace {
  std::unique_ptr<char[]> bytes;

  template <class F>
  void allocate(const F& lay_out) {
    Arena arena;
    lay_out(arena);
    bytes.reset(new char[arena.used + 64]);
    arena = {reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(bytes.get()) + 63) & ~uintptr_t(63)), 0};
    lay_out(arena);
  }
};

}  // namespace fastkd
