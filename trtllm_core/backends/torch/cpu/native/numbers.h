// Types of numbers, and the functions of one number that loops over many are made of. Arithmetic is float32.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

struct fp8 {
  uint8_t bits;  // e4m3: sign, four bits of exponent, three of mantissa; no infinity
};

template <typename To, typename From>
inline To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float load(float value) { return value; }

inline float load(bfloat16 value) { return bits_of<float>(static_cast<uint32_t>(value.bits) << 16); }

// The exponent is moved where float32 has it by a product, which makes normal numbers of subnormal ones too.
inline float load(float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t rest = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  const float number = bits_of<float>(rest) * bits_of<float>(0x77800000u);  // 2^112
  return bits_of<float>(bits_of<uint32_t>(rest < 0x0f800000u ? number : INFINITY) | sign);
}

inline float load(int8_t value) { return value; }

inline float load(fp8 value) {
  const uint32_t magnitude = value.bits & 0x7f;
  const float normal = bits_of<float>((magnitude << 20) + (120u << 23));
  const float number = magnitude < 8 ? magnitude * (1.0f / 512) : normal;
  return value.bits & 0x80 ? -number : number;
}

inline void store(float& to, float value) { to = value; }

// To the nearest, ties to even. NaN stays one.
inline void store(bfloat16& to, float value) {
  const uint32_t bits = bits_of<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0);
}

// To the nearest, ties to even, of at most 127.
inline void store(int8_t& to, float value) { to = static_cast<int8_t>(std::nearbyint(value)); }

// To the nearest, ties to even, of at most 448.
inline void store(fp8& to, float value) {
  const uint32_t bits = bits_of<uint32_t>(value), magnitude = bits & 0x7fffffff;
  const uint32_t normal = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120u << 3);
  const uint32_t small = static_cast<uint32_t>(std::nearbyint(std::fabs(value) * 512.0f));
  to.bits = static_cast<uint8_t>((bits >> 24 & 0x80) | (std::fabs(value) < 1.0f / 64 ? small : std::min(normal, 0x7eu)));
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
  return y * bits_of<float>(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

inline float silu(float x) { return x / (1.0f + exponential(std::min(-x, 80.0f))); }

#ifdef __AVX512F__
constexpr int64_t LANES = 16;
#else
constexpr int64_t LANES = 8;
#endif

// Vectors as GCC and Clang have them on every processor, as long as the processor's own: longer ones are taken apart
// through memory.
typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Integers __attribute__((vector_size(LANES * sizeof(int32_t))));

template <typename V>
inline V read(const void* from) {
  V vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

inline Floats floats(Integers from) { return __builtin_convertvector(from, Floats); }

inline Floats read_floats(const float* from) { return read<Floats>(from); }

inline Floats read_floats(const bfloat16* from) {
#if defined(__AVX512F__)
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(read<__m256i>(from)), 16);
#elif defined(__AVX2__)
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(read<__m128i>(from)), 16);
#else
  Floats to;
  for (int64_t i = 0; i < LANES; ++i) to[i] = load(from[i]);
  return to;
#endif
}

inline Integers read_bytes(const uint8_t* from) {
#if defined(__AVX512F__)
  return (Integers)_mm512_cvtepu8_epi32(read<__m128i>(from));
#elif defined(__AVX2__)
  return (Integers)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  Integers to;
  for (int64_t i = 0; i < LANES; ++i) to[i] = from[i];
  return to;
#endif
}

inline Floats read_floats(const int8_t* from) {
  return floats((read_bytes(reinterpret_cast<const uint8_t*>(from)) ^ 128) - 128);
}

inline Floats read_floats(const fp8* from) {
  const Integers code = read_bytes(&from->bits), magnitude = code & 0x7f;
  const Floats normal = (Floats)((magnitude << 20) + (120 << 23)), small = floats(magnitude) * (1.0f / 512);
  const Integers number = magnitude < 8 ? (Integers)small : (Integers)normal;
  return (Floats)(number | (code & 0x80) << 24);
}

inline Floats read_floats(const float16* from) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(read<__m256i>(from));
#elif defined(__F16C__)
  return (Floats)_mm256_cvtph_ps(read<__m128i>(from));
#else
  Floats to;
  for (int64_t i = 0; i < LANES; ++i) to[i] = load(from[i]);
  return to;
#endif
}

// In a tree, whose branches are added at the same time.
inline float sum_of(Floats vector) {
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

}  // namespace
