// What a decode step on a CPU does between its matrix products, each in one call. Compiled by compiling.py for the
// machine that it runs on; arithmetic is float32 whatever the type of the tensors. No function allocates, but for
// scores of attention, whose buffer grows with the longest sequence that a thread has seen.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

// Elements below which a second thread costs more than it saves.
constexpr int64_t SHARE_FROM = 1 << 15;

struct bfloat16 {
  uint16_t bits;
};

inline float load(float value) { return value; }

inline float load(bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline void store(float& to, float value) { to = value; }

// To the nearest, ties to even. NaN stays one.
inline void store(bfloat16& to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0);
}

// e^x for x <= 88 within 2 ulp; what is below -87 is as good as 0. The library's function does one element at a time.
// 2^n * e^r with n = round(x / ln 2), and Taylor's polynomial of degree 6 for |r| <= ln 2 / 2.
inline float exponential(float x) {
  x = std::max(x, -87.0f);
  const float n = std::nearbyint(x * 1.44269504088896f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  float y = 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return y * power;
}

template <typename T>
void rms_norm(const T* x, const T* weight, T* out, int64_t rows, int64_t size, float eps) {
#pragma omp parallel for if (rows * size >= SHARE_FROM)
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = x + row * size;
    T* to = out + row * size;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) sum += load(from[i]) * load(from[i]);
    const float factor = 1.0f / std::sqrt(sum / size + eps);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) store(to[i], load(from[i]) * factor * load(weight[i]));
  }
}

template <typename T>
void silu_gate(const T* gate_up, T* out, int64_t rows, int64_t size) {
#pragma omp parallel for if (rows * size >= SHARE_FROM)
  for (int64_t row = 0; row < rows; ++row) {
    const T *gate = gate_up + row * 2 * size, *up = gate + size;
    T* to = out + row * size;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      const float g = load(gate[i]);
      store(to[i], g / (1.0f + exponential(std::min(-g, 80.0f))) * load(up[i]));
    }
  }
}

}  // namespace

// Mirrored by ctypes in attention.py.
extern "C" struct Rows {
  const int32_t* tables;     // [rows, table_stride]: the blocks of each row
  const int64_t* lengths;    // [rows]: entries of its cache, this token's included
  const int64_t* positions;  // [rows]: of its token, in the rotary table
  const int64_t* entries;    // [rows]: where in the pool its token is written
  int64_t rows, table_stride, block_size;
};

extern "C" struct Layer {
  const void* rotary;  // [positions, 2 * rotary_dim]: cosines, then signed sines; null: none
  int64_t heads, kv_heads, head_size, rotary_dim, window;  // window 0: none
  float scale;
};

namespace {

constexpr int64_t MOST = 256;  // largest head_size

// The first rotary_dim elements turn by halves; see nn.rotary.
template <typename T>
inline void rotated(const T* x, const Layer& layer, int64_t position, float factor, float* out) {
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

// One key/value head of one row: its query heads see the same keys, which are read once for all of them.
template <typename T, int64_t SIZE>
void attend_head(const Rows& rows, const Layer& layer, const T* qkv, T* cache, T* out, int64_t row, int64_t head) {
  const int64_t size = SIZE ? SIZE : layer.head_size, group = layer.heads / layer.kv_heads;
  const int64_t entry_size = 2 * layer.kv_heads * size, length = rows.lengths[row];
  const T* token = qkv + row * (layer.heads + 2 * layer.kv_heads) * size;
  thread_local std::vector<float> buffer;
  buffer.resize(group * (2 * size + length));
  float *queries = buffer.data(), *sums = queries + group * size, *scores = sums + group * size;

  float wide[MOST];
  T* written = cache + rows.entries[row] * entry_size;
  rotated(token + (layer.heads + head) * size, layer, rows.positions[row], 1.0f, wide);
  for (int64_t i = 0; i < size; ++i) store(written[head * size + i], wide[i]);
  std::copy_n(token + (layer.heads + layer.kv_heads + head) * size, size, written + (layer.kv_heads + head) * size);
  for (int64_t q = 0; q < group; ++q)
    rotated(token + (head * group + q) * size, layer, rows.positions[row], layer.scale, queries + q * size);

  const int32_t* table = rows.tables + row * rows.table_stride;
  const int64_t first = layer.window && layer.window < length ? length - layer.window : 0;
  auto entry = [&](int64_t token) {
    const int64_t block = table[token / rows.block_size];
    return cache + (block * rows.block_size + token % rows.block_size) * entry_size;
  };
  for (int64_t t = first; t < length; ++t) {
    const T* key = entry(t) + head * size;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) wide[i] = load(key[i]);
    for (int64_t q = 0; q < group; ++q) {
      float score = 0;
      const float* query = queries + q * size;
#pragma omp simd reduction(+ : score)
      for (int64_t i = 0; i < size; ++i) score += query[i] * wide[i];
      scores[q * length + t] = score;
    }
  }
  for (int64_t q = 0; q < group; ++q) {
    float* of = scores + q * length;
    float most = of[first], total = 0;
#pragma omp simd reduction(max : most)
    for (int64_t t = first; t < length; ++t) most = std::max(most, of[t]);
#pragma omp simd reduction(+ : total)
    for (int64_t t = first; t < length; ++t) {
      of[t] = exponential(of[t] - most);
      total += of[t];
    }
    const float factor = 1.0f / total;
#pragma omp simd
    for (int64_t t = first; t < length; ++t) of[t] *= factor;
  }
  std::fill_n(sums, group * size, 0.0f);
  for (int64_t t = first; t < length; ++t) {
    const T* value = entry(t) + (layer.kv_heads + head) * size;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) wide[i] = load(value[i]);
    for (int64_t q = 0; q < group; ++q) {
      const float weight = scores[q * length + t];
      float* sum = sums + q * size;
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) sum[i] += weight * wide[i];
    }
  }
  T* to = out + (row * layer.heads + head * group) * size;
  for (int64_t i = 0; i < group * size; ++i) store(to[i], sums[i]);
}

template <typename T>
void attend(const Rows& rows, const Layer& layer, const T* qkv, T* cache, T* out) {
  int64_t work = 0;
  for (int64_t row = 0; row < rows.rows; ++row) work += rows.lengths[row] * layer.heads * layer.head_size;
  auto one = layer.head_size == 64    ? attend_head<T, 64>
             : layer.head_size == 128 ? attend_head<T, 128>
                                      : attend_head<T, 0>;
#pragma omp parallel for collapse(2) schedule(dynamic) if (work >= SHARE_FROM)
  for (int64_t row = 0; row < rows.rows; ++row)
    for (int64_t head = 0; head < layer.kv_heads; ++head) one(rows, layer, qkv, cache, out, row, head);
}

}  // namespace

// Mirrored by ctypes in kernels.py. A code is worth scale * (code - middle) + offset; see trtllm_core.quantize.
extern "C" struct Quantized {
  const uint8_t* codes;  // [out, in * bits / 8]; of 4 bits, the first of two is the lower half
  const float* scales;   // [out, groups]
  const float* offsets;  // [out, groups]; null: none
  const float* bases;    // [out, groups]: what a code of 0 is worth
  int64_t out, in, group, bits, middle;
};

namespace {

#ifdef __AVX512F__
constexpr int64_t LANES = 16;  // numbers in a vector; the least group of 4-bit codes has 16 bytes
#else
constexpr int64_t LANES = 8;
#endif
constexpr int64_t TILE = 4;    // rows for which a code is widened once

// Vectors as GCC and Clang have them on every processor: loops over bytes are left scalar by some versions of both.
typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Integers __attribute__((vector_size(LANES * sizeof(int32_t))));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

template <typename V>
inline V read(const void* from) {
  V vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

#ifdef __AVX512F__

inline Floats widened(const uint8_t* codes) {
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(read<__m128i>(codes)));
}

// A table of 16 numbers is looked up by the lowest four bits of each index: nothing is masked or converted.
inline void widen_halves(const uint8_t* codes, Floats& lower, Floats& upper) {
  const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i bytes = _mm512_cvtepu8_epi32(read<__m128i>(codes));
  lower = (Floats)_mm512_permutexvar_ps(bytes, numbers);
  upper = (Floats)_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), numbers);
}

#else

#ifdef __AVX2__

inline Floats widened(Bytes codes) {
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&codes))));
}

#else

inline Floats widened(Bytes codes) { return __builtin_convertvector(__builtin_convertvector(codes, Integers), Floats); }

#endif

inline Floats widened(const uint8_t* codes) { return widened(read<Bytes>(codes)); }

inline void widen_halves(const uint8_t* codes, Floats& lower, Floats& upper) {
  const Bytes bytes = read<Bytes>(codes);
  lower = widened(bytes & 15);
  upper = widened(bytes >> 4);
}

#endif

inline float sum_of(Floats vector) {  // in a tree, whose branches are added at the same time
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)vector);
#else
  float part[LANES];
  std::memcpy(part, &vector, sizeof part);
  for (int64_t half = LANES / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
#endif
}

// Output feature `n` of ROWS rows of x that follow each other `in` elements apart: sums over groups of scale times codes
// times x. Of 4 bits, x holds a group's elements of even places first, then the others. One feature at a time: codes
// stream from memory, and a core follows few streams at once.
template <int BITS, int ROWS>
inline void dot(const Quantized& weight, int64_t n, const float* x, float* sums) {
  const int64_t groups = weight.in / weight.group, bytes = weight.group * BITS / 8;
  const uint8_t* codes = weight.codes + n * groups * bytes;
  const float* scales = weight.scales + n * groups;
  Floats total[ROWS] = {};
  for (int64_t g = 0; g < groups; ++g, codes += bytes, x += weight.group) {
    Floats part[ROWS] = {};
    for (int64_t j = 0; j < bytes; j += LANES) {
      if (BITS == 8) {
        const Floats code = widened(codes + j);
        for (int row = 0; row < ROWS; ++row) part[row] += code * read<Floats>(x + row * weight.in + j);
      } else {
        Floats even, odd;
        widen_halves(codes + j, even, odd);
        for (int row = 0; row < ROWS; ++row) {
          const float* of = x + row * weight.in + j;
          part[row] += even * read<Floats>(of) + odd * read<Floats>(of + bytes);
        }
      }
    }
    for (int row = 0; row < ROWS; ++row) total[row] += scales[g] * part[row];
  }
  for (int row = 0; row < ROWS; ++row) sums[row] = sum_of(total[row]);
}

template <typename T, int BITS>
void quantized_linear(const Quantized& weight, const T* x, const T* bias, T* out, int64_t rows) {
  const int64_t groups = weight.in / weight.group, half = weight.group / 2;
  thread_local std::vector<float> buffer;
  buffer.resize(rows * (weight.in + groups));
  float *wide = buffer.data(), *totals = wide + rows * weight.in;  // x as dot wants it, and sums of its groups: shared
  for (int64_t group = 0; group < rows * groups; ++group) {
    const T* from = x + group * weight.group;
    float *to = wide + group * weight.group, total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < half; ++i) {
      const float even = load(from[2 * i]), odd = load(from[2 * i + 1]);
      to[BITS == 8 ? 2 * i : i] = even;
      to[BITS == 8 ? 2 * i + 1 : half + i] = odd;
      total += even + odd;
    }
    totals[group] = total;
  }
#pragma omp parallel for if (weight.out * weight.in >= SHARE_FROM)
  for (int64_t n = 0; n < weight.out; ++n) {
    const float* bases = weight.bases + n * groups;
    for (int64_t row = 0; row < rows;) {
      const int64_t many = rows - row >= TILE ? TILE : 1;
      float sums[TILE];
      (many == TILE ? dot<BITS, TILE> : dot<BITS, 1>)(weight, n, wide + row * weight.in, sums);
      for (int64_t i = 0; i < many; ++i, ++row) {
        const float* total = totals + row * groups;
        float sum = sums[i];
#pragma omp simd reduction(+ : sum)
        for (int64_t g = 0; g < groups; ++g) sum += bases[g] * total[g];
        store(out[row * weight.out + n], bias == nullptr ? sum : sum + load(bias[n]));
      }
    }
  }
}

template <typename T>
void dequantize(const Quantized& weight, T* out) {
  const int64_t groups = weight.in / weight.group, bytes = weight.group * weight.bits / 8;
#pragma omp parallel for if (weight.out * weight.in >= SHARE_FROM)
  for (int64_t group = 0; group < weight.out * groups; ++group) {
    const uint8_t* codes = weight.codes + group * bytes;
    const float scale = weight.scales[group], offset = weight.offsets == nullptr ? 0.0f : weight.offsets[group];
    const int32_t middle = static_cast<int32_t>(weight.middle);
    T* to = out + group * weight.group;
    if (weight.bits == 8) {
#pragma omp simd
      for (int64_t i = 0; i < bytes; ++i) store(to[i], scale * static_cast<float>(codes[i] - middle) + offset);
    } else {
      for (int64_t i = 0; i < bytes; ++i) {
        store(to[2 * i], scale * static_cast<float>((codes[i] & 15) - middle) + offset);
        store(to[2 * i + 1], scale * static_cast<float>((codes[i] >> 4) - middle) + offset);
      }
    }
  }
}

}  // namespace

#define EXPORT(NAME, T)                                                                                               \
  extern "C" void rms_norm_##NAME(const T* x, const T* weight, T* out, int64_t rows, int64_t size, float eps) {       \
    rms_norm(x, weight, out, rows, size, eps);                                                                        \
  }                                                                                                                   \
  extern "C" void silu_gate_##NAME(const T* gate_up, T* out, int64_t rows, int64_t size) {                            \
    silu_gate(gate_up, out, rows, size);                                                                              \
  }                                                                                                                   \
  extern "C" void attend_##NAME(const Rows* rows, const Layer* layer, const T* qkv, T* cache, T* out) {               \
    attend(*rows, *layer, qkv, cache, out);                                                                           \
  }                                                                                                                   \
  extern "C" void quantized_linear_##NAME(const Quantized* weight, const T* x, const T* bias, T* out, int64_t rows) { \
    (weight->bits == 8 ? quantized_linear<T, 8> : quantized_linear<T, 4>)(*weight, x, bias, out, rows);               \
  }                                                                                                                   \
  extern "C" void dequantize_##NAME(const Quantized* weight, T* out) { dequantize(*weight, out); }

EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)
