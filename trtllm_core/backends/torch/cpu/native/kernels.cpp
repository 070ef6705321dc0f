// What a decode step on a CPU is made of. Compiled by compiling.py for the machine that it runs on; arithmetic is
// float32 whatever the type of the tensors, but for products with activations that are rounded. Nothing is allocated
// but a note of what is done, and buffers of a thread, which grow with the largest step that it has seen.

#include <omp.h>

#include <vector>

#include "attention.h"
#include "product.h"
#include "rows.h"
#include "tiles.h"

extern "C" struct Operation {
  void (*run)(const void* arguments, const Team& team);
  const void* arguments;
};

// One after the other: each begins when the one before it is done.
extern "C" void run(const Operation* operations, int64_t count, int64_t threads) {
  if (threads == 1) {
    const Team alone(nullptr, 1);
    for (int64_t i = 0; i < count; ++i) operations[i].run(operations[i].arguments, alone);
    return;
  }
  std::vector<Progress> progress(count);
#pragma omp parallel num_threads(threads)
  for (int64_t i = 0; i < count; ++i)
    operations[i].run(operations[i].arguments, Team(&progress[i], omp_get_num_threads()));
}

// Whether this machine multiplies rounded activations faster than others.
extern "C" int64_t multiplies_bytes() { return MULTIPLIES_BYTES; }

#define OPERATION(NAME, ...) \
  extern "C" void NAME(const void* arguments, const Team& team) { __VA_ARGS__(arguments, team); }

#define OPERATIONS(TYPE, T)                         \
  OPERATION(rms_norm_##TYPE, rms_norm<T>)           \
  OPERATION(silu_gate_##TYPE, silu_gate<T>)         \
  OPERATION(attend_##TYPE, attend<T>)               \
  OPERATION(attend_int8_##TYPE, attend<T, int8_t>)  \
  OPERATION(attend_fp8_##TYPE, attend<T, fp8>)      \
  OPERATION(linear_##TYPE, linear<T>)               \
  OPERATION(lookup_##TYPE, lookup<T>)               \
  OPERATION(dequantize_##TYPE, dequantize<T>)

OPERATION(copy_rows, copied)
OPERATIONS(float32, float)
OPERATIONS(bfloat16, bfloat16)
