// What a decode step on a CPU is made of. Compiled by compiling.py for the machine that it runs on; arithmetic is
// float32 whatever the type of the tensors, but for products with activations that are rounded. Nothing is allocated
// but for buffers of a thread, which grow with the largest step that it has seen.

#include <omp.h>

#include "attention.h"
#include "product.h"
#include "rows.h"
#include "tiles.h"

extern "C" struct Operation {
  void (*run)(const void* arguments, Team team);
  const void* arguments;
};

// One after the other, all threads at the same one: each begins when the one before it is done.
extern "C" void run(const Operation* operations, int64_t count, int64_t threads) {
  if (threads == 1) {
    for (int64_t i = 0; i < count; ++i) operations[i].run(operations[i].arguments, {0, 1});
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const Team team{omp_get_thread_num(), omp_get_num_threads()};
    for (int64_t i = 0; i < count; ++i) {
      operations[i].run(operations[i].arguments, team);
#pragma omp barrier
    }
  }
}

// Whether this machine multiplies rounded activations faster than others.
extern "C" int64_t multiplies_bytes() { return MULTIPLIES_BYTES; }

extern "C" void copy_rows(const void* arguments, Team team) { copied(arguments, team); }

#define EXPORT(NAME, T)                                                                          \
  extern "C" void rms_norm_##NAME(const void* arguments, Team team) { rms_norm<T>(arguments, team); }     \
  extern "C" void silu_gate_##NAME(const void* arguments, Team team) { silu_gate<T>(arguments, team); }   \
  extern "C" void attend_##NAME(const void* arguments, Team team) { attend<T>(arguments, team); }         \
  extern "C" void attend_int8_##NAME(const void* arguments, Team team) { attend<T, int8_t>(arguments, team); } \
  extern "C" void attend_fp8_##NAME(const void* arguments, Team team) { attend<T, fp8>(arguments, team); } \
  extern "C" void linear_##NAME(const void* arguments, Team team) { linear<T>(arguments, team); }         \
  extern "C" void lookup_##NAME(const void* arguments, Team team) { lookup<T>(arguments, team); }         \
  extern "C" void dequantize_##NAME(const void* arguments, Team team) { dequantize<T>(arguments, team); }

EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)
