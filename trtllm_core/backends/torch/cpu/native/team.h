// Threads that run the same operation at the same time, each its share.

#pragma once

#include <algorithm>
#include <cstdint>

namespace {

struct Team {
  int64_t thread, threads;

  struct Range {
    int64_t begin, end;
  };

  // This thread's part of 0..count. Neighbours lie together, and a thread has the same ones in every step.
  Range share(int64_t count) const {
    return {count * thread / threads, count * (thread + 1) / threads};
  }
};

}  // namespace
