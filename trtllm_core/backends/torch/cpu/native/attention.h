// Attention of a decode step: rotation, the cache's new entry, scores, and the weighted sum.

#pragma once

#include <vector>

#include "numbers.h"
#include "team.h"

// What changes from step to step.
extern "C" struct Rows {
  const int32_t* tables;     // [rows, table_stride]: the blocks of each row
  const int64_t* lengths;    // [rows]: entries of its cache, this token's, the last, included
  const int64_t* positions;  // [rows]: of its token, in the rotary table
  int64_t rows, table_stride, block_size;
};

extern "C" struct Heads {
  const void* rotary;  // [positions, 2 * rotary_dim]: cosines, then signed sines; null: none
  int64_t heads, kv_heads, head_size, rotary_dim, window;  // window 0: none
  float scale;
};

extern "C" struct Attend {
  const Rows* rows;
  Heads layer;
  const void* qkv;  // [rows, heads + 2 * kv_heads, head_size]
  void* cache;      // [entries, 2 * kv_heads, head_size]: numbers or codes
  float* scales;    // of codes: [blocks, 2 * kv_heads, block_size]
  void* out;        // [rows, heads, head_size]
};

namespace {

constexpr int64_t MOST = 256;  // largest head_size

// The first rotary_dim elements turn by halves; see nn.rotary.
template <typename T>
inline void rotated(const T* x, const Heads& layer, int64_t position, float factor, float* out) {
  const int64_t size = layer.head_size, dim = layer.rotary == nullptr ? 0 : layer.rotary_dim, half = dim / 2;
  const T* cosine = static_cast<const T*>(layer.rotary) + position * 2 * dim;
  const T* sine = cosine + dim;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float a = load(x[i]), b = load(x[i + half]);
    out[i] = (a * load(cosine[i]) + b * load(sine[i])) * factor;
    out[i + half] = (b * load(cosine[i + half]) + a * load(sine[i + half])) * factor;
  }
  for (int64_t i = dim; i < size; ++i) out[i] = load(x[i]) * factor;
}

// Largest code of a type; 0: it holds numbers.
template <typename C>
constexpr float LARGEST = 0.0f;
template <>
constexpr float LARGEST<int8_t> = 127.0f;
template <>
constexpr float LARGEST<fp8> = 448.0f;

// One head of a key, or of a value, as a cache keeps it. Returns what codes are multiplied with; see layer_cache.py.
template <typename C>
inline float keep(const float* from, int64_t size, C* to) {
  if (LARGEST<C> == 0.0f) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) store(to[i], from[i]);
    return 1.0f;
  }
  float most = 1e-30f;
  bool unknown = false;  // a maximum passes NaN over
  for (int64_t i = 0; i < size; ++i) {
    most = std::max(most, std::fabs(from[i]));
    unknown |= from[i] != from[i];
  }
  const float scale = most / LARGEST<C>;
  for (int64_t i = 0; i < size; ++i) store(to[i], unknown ? 0.0f : from[i] / scale);
  return unknown ? NAN : scale;
}

inline void softmax(float* scores, int64_t count) {
  float most = scores[0], total = 0;
#pragma omp simd reduction(max : most)
  for (int64_t t = 0; t < count; ++t) most = std::max(most, scores[t]);
#pragma omp simd reduction(+ : total)
  for (int64_t t = 0; t < count; ++t) {
    scores[t] = exponential(scores[t] - most);
    total += scores[t];
  }
  const float factor = 1.0f / total;
#pragma omp simd
  for (int64_t t = 0; t < count; ++t) scores[t] *= factor;
}

// Some query heads of one row that see the same keys, which are read once for all of them. Whoever has the first head
// of the group writes the row's new entry; the others see the same numbers without it.
template <typename T, typename C, int64_t SIZE>
void attend_heads(const Attend& of, int64_t row, int64_t begin, int64_t end) {
  const Rows& rows = *of.rows;
  const Heads& layer = of.layer;
  const int64_t size = SIZE ? SIZE : layer.head_size, group = layer.heads / layer.kv_heads, head = begin / group;
  const int64_t kept = 2 * layer.kv_heads, value_head = layer.kv_heads + head;
  const int64_t length = rows.lengths[row], count = end - begin;
  const int64_t first = layer.window && layer.window < length ? length - layer.window : 0, seen = length - first;
  const T* token = static_cast<const T*>(of.qkv) + row * (layer.heads + 2 * layer.kv_heads) * size;
  thread_local std::vector<float> buffer;
  buffer.resize(count * (2 * size + seen));
  float *queries = buffer.data(), *sums = queries + count * size, *scores = sums + count * size;

  const int32_t* table = rows.tables + row * rows.table_stride;
  auto entry = [&](int64_t t, int64_t of_head) {
    const int64_t block = table[t / rows.block_size];
    return static_cast<C*>(of.cache) + ((block * rows.block_size + t % rows.block_size) * kept + of_head) * size;
  };
  auto scale = [&](int64_t t, int64_t of_head) -> float& {
    return of.scales[(table[t / rows.block_size] * kept + of_head) * rows.block_size + t % rows.block_size];
  };
  constexpr bool CODED = LARGEST<C> != 0.0f;
  float wide[MOST];
  C key_now[MOST], value_now[MOST];
  rotated(token + (layer.heads + head) * size, layer, rows.positions[row], 1.0f, wide);
  const float key_scale = keep(wide, size, key_now);
  for (int64_t i = 0; i < size; ++i) wide[i] = load(token[(layer.heads + value_head) * size + i]);
  const float value_scale = keep(wide, size, value_now);
  if (begin % group == 0) {
    std::copy_n(key_now, size, entry(length - 1, head));
    std::copy_n(value_now, size, entry(length - 1, value_head));
    if (CODED) {
      scale(length - 1, head) = key_scale;
      scale(length - 1, value_head) = value_scale;
    }
  }
  for (int64_t q = 0; q < count; ++q)
    rotated(token + (begin + q) * size, layer, rows.positions[row], layer.scale, queries + q * size);

  for (int64_t t = first; t < length; ++t) {
    const C* key = t == length - 1 ? key_now : entry(t, head);
    const float unit = t == length - 1 || !CODED ? key_scale : scale(t, head);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) wide[i] = load(key[i]);
    for (int64_t q = 0; q < count; ++q) {
      float score = 0;
      const float* query = queries + q * size;
#pragma omp simd reduction(+ : score)
      for (int64_t i = 0; i < size; ++i) score += query[i] * wide[i];
      scores[q * seen + t - first] = score * unit;
    }
  }
  for (int64_t q = 0; q < count; ++q) softmax(scores + q * seen, seen);
  std::fill_n(sums, count * size, 0.0f);
  for (int64_t t = first; t < length; ++t) {
    const C* value = t == length - 1 ? value_now : entry(t, value_head);
    const float unit = t == length - 1 || !CODED ? value_scale : scale(t, value_head);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) wide[i] = load(value[i]);
    for (int64_t q = 0; q < count; ++q) {
      const float weight = scores[q * seen + t - first] * unit;
      float* sum = sums + q * size;
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) sum[i] += weight * wide[i];
    }
  }
  T* to = static_cast<T*>(of.out) + (row * layer.heads + begin) * size;
  for (int64_t i = 0; i < count * size; ++i) store(to[i], sums[i]);
}

// Query heads of all rows are shared out evenly, in order: a thread's lie in as few groups as can be.
template <typename T, typename C = T>
void attend(const void* arguments, Team team) {
  const Attend& of = *static_cast<const Attend*>(arguments);
  const int64_t heads = of.layer.heads, group = heads / of.layer.kv_heads;
  auto some = of.layer.head_size == 64    ? attend_heads<T, C, 64>
              : of.layer.head_size == 128 ? attend_heads<T, C, 128>
                                          : attend_heads<T, C, 0>;
  const auto [begin, end] = team.share(of.rows->rows * heads);
  for (int64_t at = begin; at < end;) {
    const int64_t stop = std::min(end, (at / group + 1) * group), row = at / heads;
    some(of, row, at - row * heads, stop - row * heads);
    at = stop;
  }
}

}  // namespace
