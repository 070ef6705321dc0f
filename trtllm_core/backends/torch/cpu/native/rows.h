// What becomes of rows of activations before a product, or by itself.

#pragma once

#include "tiles.h"

namespace {

template <typename T, typename To>
void rms_normed(const T* x, const T* weight, To* out, int64_t size, float eps) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += load(x[i]) * load(x[i]);
  const float factor = 1.0f / std::sqrt(sum / size + eps);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) store(out[i], load(x[i]) * factor * load(weight[i]));
}

// x [2 * size]: gate, then up.
template <typename T, typename To>
void silu_gated(const T* x, To* out, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) store(out[i], silu(load(x[i])) * load(x[i + size]));
}

// One row's activations as integers: x[i] is about codes[i] * factors[i / BLOCK].
struct Rounded {
  int8_t* codes;    // [size]
  float* factors;   // [size / BLOCK]
  int32_t* totals;  // [size / BLOCK]: sums of codes
};

// To the nearest, ties to even, from -127 to 127. What is not finite makes its block's factor NaN.
inline void round_row(const float* x, int64_t size, const Rounded& out) {
  constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: the lowest bits of a sum with it are the rounded number
  for (int64_t block = 0; block < size / BLOCK; ++block) {
    const float* from = x + block * BLOCK;
    int8_t* to = out.codes + block * BLOCK;
    float most = 0, sum = 0;
#pragma omp simd reduction(max : most) reduction(+ : sum)
    for (int64_t i = 0; i < BLOCK; ++i) {
      most = std::max(most, std::fabs(from[i]));
      sum += from[i] * 0.0f;
    }
    const float inverse = most > 0 ? 127.0f / most : 0.0f;
    int32_t total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < BLOCK; ++i) {
      const int32_t code = bits_of<int32_t>(from[i] * inverse + MAGIC) - bits_of<int32_t>(MAGIC);
      to[i] = static_cast<int8_t>(code);
      total += code;
    }
    out.factors[block] = most / 127.0f + sum;
    out.totals[block] = total;
  }
}

}  // namespace

// Mirrored by ctypes in operations.py, as all structures of arguments are.
extern "C" struct Norm {
  const void* x;       // [rows, size]
  const void* weight;  // [size]
  void* out;           // [rows, size]
  int64_t rows, size;
  float eps;
};

extern "C" struct Gate {
  const void* x;  // [rows, 2 * size]
  void* out;      // [rows, size]
  int64_t rows, size;
};

namespace {

template <typename T>
void rms_norm(const void* arguments, const Team& team) {
  const Norm& norm = *static_cast<const Norm*>(arguments);
  team.share(norm.rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      rms_normed(static_cast<const T*>(norm.x) + row * norm.size, static_cast<const T*>(norm.weight),
                 static_cast<T*>(norm.out) + row * norm.size, norm.size, norm.eps);
  });
}

template <typename T>
void silu_gate(const void* arguments, const Team& team) {
  const Gate& gate = *static_cast<const Gate*>(arguments);
  team.share(gate.rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      silu_gated(static_cast<const T*>(gate.x) + 2 * row * gate.size, static_cast<T*>(gate.out) + row * gate.size,
                 gate.size);
  });
}

}  // namespace
