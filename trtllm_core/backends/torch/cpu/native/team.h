// Threads that run the same operations in the same order, each some parts of them.

#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace {

// How far an operation is, in a cache line of its own.
struct alignas(64) Progress {
  std::atomic<int64_t> taken{0}, done{0};
};

inline void wait_a_moment() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Nobody waits for a thread, only for parts that one has taken: where other work keeps a thread from running, those that
// do run go on without it. A barrier would cost a turn of the scheduler for each operation then.
class Team {
 public:
  Team(Progress* progress, int64_t threads) : progress_(progress), threads_(threads) {}

  int64_t threads() const { return threads_; }

  // Calls body(begin, end) until all of 0..count are taken, by whomever, and returns when all are done. Where all threads
  // run each takes one share: neighbours lie together in memory.
  template <typename F>
  void share(int64_t count, F&& body) const {
    if (threads_ == 1) return body(int64_t{0}, count);
    const int64_t share = (count + threads_ - 1) / threads_;
    while (true) {
      const int64_t begin = progress_->taken.fetch_add(share, std::memory_order_relaxed);
      if (begin >= count) break;
      const int64_t end = std::min(count, begin + share);
      body(begin, end);
      progress_->done.fetch_add(end - begin, std::memory_order_release);
    }
    for (int64_t turns = 0; progress_->done.load(std::memory_order_acquire) < count; ++turns)
      turns < PATIENCE ? wait_a_moment() : static_cast<void>(sched_yield());
  }

 private:
  static constexpr int64_t PATIENCE = 2000;  // turns, some microseconds, before others get the processor
  Progress* progress_;
  int64_t threads_;
};

}  // namespace
