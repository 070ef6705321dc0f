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

// One key/value head of one row's cache, and its newest entry, which may not be written yet.
template <typename C>
struct Cache {
  const C* entries;     // of the pool, this head's keys
  const float* scales;  // of codes, this head's keys; else null
  const int32_t* table;
  int64_t block_size, kept, values_after, head_size;  // kept: heads of an entry; values lie so many heads after keys
  int64_t first, length;                              // entries that are seen; the last of them is the newest
  const C *key_now, *value_now;
  float key_scale_now, value_scale_now;

  // Calls with each entry's number, key and value, and what those are multiplied with.
  template <typename F>
  void each(F&& body) const {
    const int64_t entry_size = kept * head_size, value = values_after * head_size;
    for (int64_t t = first; t < length - 1;) {
      const int64_t block = t / block_size, end = std::min((block + 1) * block_size, length - 1);
      const C* key = entries + (table[block] * block_size + t % block_size) * entry_size;
      const float* scale = scales == nullptr ? nullptr : scales + table[block] * kept * block_size + t % block_size;
      for (; t < end; ++t, key += entry_size) {
        if (LARGEST<C> == 0.0f) {
          body(t - first, key, key + value, 1.0f, 1.0f);
        } else {
          body(t - first, key, key + value, scale[0], scale[values_after * block_size]);
          ++scale;
        }
      }
    }
    body(length - 1 - first, key_now, value_now, key_scale_now, value_scale_now);
  }
};

// Elements i and on of x [size]; zeros beyond.
template <typename T>
inline Floats read_some(const T* x, int64_t i, int64_t size) {
  if (i + LANES <= size) return read_floats(x + i);
  T some[LANES] = {};
  std::copy(x + i, x + size, some);
  return read_floats(some);
}

// Queries that see the same keys, scaled, [QUERIES, size], over one cache; out alike. Sums stay in registers.
template <typename T, typename C, int64_t SIZE, int QUERIES>
void attend_queries(const Cache<C>& cache, const float* queries, float* scores, T* out) {
  constexpr int64_t PIECES = ((SIZE ? SIZE : MOST) + LANES - 1) / LANES;
  const int64_t size = SIZE ? SIZE : cache.head_size, pieces = SIZE ? PIECES : (size + LANES - 1) / LANES;
  const int64_t seen = cache.length - cache.first;
  Floats query[QUERIES][PIECES], sum[QUERIES][PIECES] = {};
  for (int q = 0; q < QUERIES; ++q)
    for (int64_t p = 0; p < pieces; ++p) query[q][p] = read_some(queries + q * size, p * LANES, size);
  cache.each([&](int64_t t, const C* key, const C*, float unit, float) {
    Floats score[QUERIES] = {};
    for (int64_t p = 0; p < pieces; ++p) {
      const Floats piece = read_some(key, p * LANES, size);
      for (int q = 0; q < QUERIES; ++q) score[q] += query[q][p] * piece;
    }
    for (int q = 0; q < QUERIES; ++q) scores[q * seen + t] = sum_of(score[q]) * unit;
  });
  for (int q = 0; q < QUERIES; ++q) softmax(scores + q * seen, seen);
  cache.each([&](int64_t t, const C*, const C* value, float, float unit) {
    float weight[QUERIES];
    for (int q = 0; q < QUERIES; ++q) weight[q] = scores[q * seen + t] * unit;
    for (int64_t p = 0; p < pieces; ++p) {
      const Floats piece = read_some(value, p * LANES, size);
      for (int q = 0; q < QUERIES; ++q) sum[q][p] += weight[q] * piece;
    }
  });
  for (int q = 0; q < QUERIES; ++q) {
    float wide[PIECES * LANES];
    std::memcpy(wide, sum[q], sizeof wide);
    for (int64_t i = 0; i < size; ++i) store(out[q * size + i], wide[i]);
  }
}

constexpr int64_t MOST_QUERIES = 4;  // that see a key at a time

// Some query heads of one row that see the same keys. Whoever has the first head of the group writes the row's new
// entry; the others see the same numbers without it.
template <typename T, typename C, int64_t SIZE>
void attend_heads(const Attend& of, int64_t row, int64_t begin, int64_t end) {
  const Rows& rows = *of.rows;
  const Heads& layer = of.layer;
  const int64_t size = layer.head_size, group = layer.heads / layer.kv_heads, head = begin / group;
  const int64_t kept = 2 * layer.kv_heads, block_size = rows.block_size, last = rows.lengths[row] - 1;
  const T* token = static_cast<const T*>(of.qkv) + row * (layer.heads + kept) * size;
  float wide[MOST];
  C key_now[MOST], value_now[MOST];
  rotated(token + (layer.heads + head) * size, layer, rows.positions[row], 1.0f, wide);
  const float key_scale = keep(wide, size, key_now);
  for (int64_t i = 0; i < size; ++i) wide[i] = load(token[(layer.heads + layer.kv_heads + head) * size + i]);
  const float value_scale = keep(wide, size, value_now);

  C* entries = static_cast<C*>(of.cache) + head * size;
  float* scales = LARGEST<C> == 0.0f ? nullptr : of.scales + head * block_size;
  const int32_t* table = rows.tables + row * rows.table_stride;
  if (begin % group == 0) {
    const int64_t block = table[last / block_size];
    C* written = entries + (block * block_size + last % block_size) * kept * size;
    std::copy_n(key_now, size, written);
    std::copy_n(value_now, size, written + layer.kv_heads * size);
    if (scales != nullptr) {
      float* scale = scales + block * kept * block_size + last % block_size;
      scale[0] = key_scale;
      scale[layer.kv_heads * block_size] = value_scale;
    }
  }
  const int64_t first = layer.window && layer.window <= last ? last + 1 - layer.window : 0;
  const Cache<C> cache{entries, scales,  table,   block_size, kept,      layer.kv_heads, size,
                       first,   last + 1, key_now, value_now,  key_scale, value_scale};
  thread_local std::vector<float> buffer;
  buffer.resize(MOST_QUERIES * (size + last + 1));
  float *queries = buffer.data(), *scores = queries + MOST_QUERIES * size;
  for (int64_t at = begin, count; at < end; at += count) {
    count = std::min(end - at, MOST_QUERIES);
    for (int64_t q = 0; q < count; ++q)
      rotated(token + (at + q) * size, layer, rows.positions[row], layer.scale, queries + q * size);
    auto some = count == 1   ? attend_queries<T, C, SIZE, 1>
                : count == 2 ? attend_queries<T, C, SIZE, 2>
                : count == 3 ? attend_queries<T, C, SIZE, 3>
                             : attend_queries<T, C, SIZE, 4>;
    some(cache, queries, scores, static_cast<T*>(of.out) + (row * layer.heads + at) * size);
  }
}

// Query heads of all rows are shared out in order: a thread's lie in as few groups as can be.
template <typename T, typename C = T>
void attend(const void* arguments, const Team& team) {
  const Attend& of = *static_cast<const Attend*>(arguments);
  const int64_t heads = of.layer.heads, group = heads / of.layer.kv_heads;
  auto some = of.layer.head_size == 64    ? attend_heads<T, C, 64>
              : of.layer.head_size == 128 ? attend_heads<T, C, 128>
                                          : attend_heads<T, C, 0>;
  team.share(of.rows->rows * heads, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end;) {
      const int64_t stop = std::min(end, (at / group + 1) * group), row = at / heads;
      some(of, row, at - row * heads, stop - row * heads);
      at = stop;
    }
  });
}

}  // namespace
