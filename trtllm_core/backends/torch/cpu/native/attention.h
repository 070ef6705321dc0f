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
  void* cache;      // [entries, 2 * kv_heads, head_size]
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
template <typename T, int64_t SIZE>
void attend_heads(const Attend& of, int64_t row, int64_t begin, int64_t end) {
  const Rows& rows = *of.rows;
  const Heads& layer = of.layer;
  const int64_t size = SIZE ? SIZE : layer.head_size, group = layer.heads / layer.kv_heads, head = begin / group;
  const int64_t entry_size = 2 * layer.kv_heads * size, length = rows.lengths[row], count = end - begin;
  const int64_t first = layer.window && layer.window < length ? length - layer.window : 0, seen = length - first;
  const T* token = static_cast<const T*>(of.qkv) + row * (layer.heads + 2 * layer.kv_heads) * size;
  const T* value_now = token + (layer.heads + layer.kv_heads + head) * size;
  thread_local std::vector<float> buffer;
  buffer.resize(count * (2 * size + seen));
  float *queries = buffer.data(), *sums = queries + count * size, *scores = sums + count * size;

  const int32_t* table = rows.tables + row * rows.table_stride;
  auto entry = [&](int64_t t) {
    const int64_t block = table[t / rows.block_size];
    return static_cast<T*>(of.cache) + (block * rows.block_size + t % rows.block_size) * entry_size;
  };
  float wide[MOST];
  T key_now[MOST];
  rotated(token + (layer.heads + head) * size, layer, rows.positions[row], 1.0f, wide);
  for (int64_t i = 0; i < size; ++i) store(key_now[i], wide[i]);
  if (begin % group == 0) {
    T* written = entry(length - 1);
    std::copy_n(key_now, size, written + head * size);
    std::copy_n(value_now, size, written + (layer.kv_heads + head) * size);
  }
  for (int64_t q = 0; q < count; ++q)
    rotated(token + (begin + q) * size, layer, rows.positions[row], layer.scale, queries + q * size);

  for (int64_t t = first; t < length; ++t) {
    const T* key = t == length - 1 ? key_now : entry(t) + head * size;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) wide[i] = load(key[i]);
    for (int64_t q = 0; q < count; ++q) {
      float score = 0;
      const float* query = queries + q * size;
#pragma omp simd reduction(+ : score)
      for (int64_t i = 0; i < size; ++i) score += query[i] * wide[i];
      scores[q * seen + t - first] = score;
    }
  }
  for (int64_t q = 0; q < count; ++q) softmax(scores + q * seen, seen);
  std::fill_n(sums, count * size, 0.0f);
  for (int64_t t = first; t < length; ++t) {
    const T* value = t == length - 1 ? value_now : entry(t) + (layer.kv_heads + head) * size;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) wide[i] = load(value[i]);
    for (int64_t q = 0; q < count; ++q) {
      const float weight = scores[q * seen + t - first];
      float* sum = sums + q * size;
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) sum[i] += weight * wide[i];
    }
  }
  T* to = static_cast<T*>(of.out) + (row * layer.heads + begin) * size;
  for (int64_t i = 0; i < count * size; ++i) store(to[i], sums[i]);
}

// Query heads of all rows are shared out evenly, in order: a thread's lie in as few groups as can be.
template <typename T>
void attend(const void* arguments, Team team) {
  const Attend& of = *static_cast<const Attend*>(arguments);
  const int64_t heads = of.layer.heads, group = heads / of.layer.kv_heads;
  auto some = of.layer.head_size == 64    ? attend_heads<T, 64>
              : of.layer.head_size == 128 ? attend_heads<T, 128>
                                          : attend_heads<T, 0>;
  const auto [begin, end] = team.share(of.rows->rows * heads);
  for (int64_t at = begin; at < end;) {
    const int64_t stop = std::min(end, (at / group + 1) * group), row = at / heads;
    some(of, row, at - row * heads, stop - row * heads);
    at = stop;
  }
}

}  // namespace
