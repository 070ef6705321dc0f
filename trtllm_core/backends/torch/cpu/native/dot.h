// Products of a tile of a quantised weight with a few rows of activations, float32 or rounded to 8 bits.

#pragma once

#include "rows.h"
#include "tiles.h"

#if (defined(__AVX512VNNI__) && defined(__AVX512F__)) || (defined(__AVXVNNI__) && defined(__AVX2__))
#define MULTIPLIES_BYTES 1
#else
#define MULTIPLIES_BYTES 0
#endif

namespace {

// Rows that a code is read for once: as many as there are registers for.
constexpr int64_t MOST_ROWS = LANES == 16 ? 8 : 4, SOME_ROWS = MOST_ROWS / 2;

// A tile's width of numbers.
struct Wide {
  Floats part[PARTS];
};

template <typename S>
inline Wide read_wide(const uint8_t* from) {
  Wide wide;
  for (int64_t p = 0; p < PARTS; ++p) wide.part[p] = read_floats(reinterpret_cast<const S*>(from) + p * LANES);
  return wide;
}

#ifdef __AVX512F__
// A table of 16 numbers is looked up by the lowest four bits of each index: nothing is masked or converted.
inline Floats half_code(Integers word, int shift, float middle) {
  const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i index = _mm512_srli_epi32((__m512i)word, shift);
  return (Floats)_mm512_permutexvar_ps(index, _mm512_sub_ps(numbers, _mm512_set1_ps(middle)));
}
#else
inline Floats half_code(Integers word, int shift, float middle) { return floats((word >> shift) & 15) - middle; }
#endif

inline Floats whole_code(Integers word, int shift, float middle) { return floats((word >> shift) & 255) - middle; }

// Sums over groups of scale times codes times x, and of offset times the group's sum. x [ROWS, in]; sums of x's groups
// [ROWS, in / group].
template <int BITS, int ROWS, typename S, bool OFFSETS>
inline void dot(const Packed& weight, const uint8_t* record, const float* x, const float* sums, Wide* totals) {
  constexpr int64_t CODES = 32 / BITS, HEADER = TILE * sizeof(S);
  const int64_t groups = weight.in / weight.group;
  const float middle = OFFSETS ? 0.0f : static_cast<float>(weight.middle);
  for (int64_t g = 0; g < groups; ++g, x += weight.group) {
    const Wide scale = read_wide<S>(record), offset = OFFSETS ? read_wide<S>(record + HEADER) : Wide{};
    record += OFFSETS ? 2 * HEADER : HEADER;
    Floats sum[ROWS][PARTS][2] = {};  // of even and of odd codes: two chains, which go on at the same time
    for (int64_t i = 0; i < weight.group; i += CODES, record += TILE * WORD) {
      for (int64_t p = 0; p < PARTS; ++p) {
        const Integers word = read<Integers>(record + p * LANES * WORD);
#pragma GCC unroll 8
        for (int c = 0; c < CODES; ++c) {
          const Floats code =
              BITS == 8 ? whole_code(word, 8 * c, middle) : half_code(word, c % 4 * 8 + c / 4 * 4, middle);
          for (int row = 0; row < ROWS; ++row) sum[row][p][c % 2] += code * x[row * weight.in + i + c];
        }
      }
    }
    for (int row = 0; row < ROWS; ++row) {
      for (int64_t p = 0; p < PARTS; ++p) {
        totals[row].part[p] += scale.part[p] * (sum[row][p][0] + sum[row][p][1]);
        if (OFFSETS) totals[row].part[p] += offset.part[p] * sums[row * groups + g];
      }
    }
  }
}

#if MULTIPLIES_BYTES

#ifdef __AVX512F__
typedef uint8_t Bytes __attribute__((vector_size(64)));
// To each sum, the four products of a word's bytes with those of x are added.
inline Integers multiplied(Integers sum, Bytes word, int32_t x) {
  return (Integers)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)word, _mm512_set1_epi32(x));
}
#else
typedef uint8_t Bytes __attribute__((vector_size(32)));
inline Integers multiplied(Integers sum, Bytes word, int32_t x) {
  return (Integers)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)word, _mm256_set1_epi32(x));
}
#endif

inline Bytes upper_halves(Bytes word) { return (Bytes)((Integers)word >> 4) & 15; }

// The same of rows that were rounded, one behind the other.
template <int BITS, int ROWS, typename S, bool OFFSETS>
inline void dot(const Packed& weight, const uint8_t* record, const Rounded& x, Wide* totals) {
  constexpr int64_t CODES = 32 / BITS, HEADER = TILE * sizeof(S);
  const int64_t groups = weight.in / weight.group, blocks = weight.in / BLOCK;
  const int32_t middle = static_cast<int32_t>(weight.middle);
  for (int64_t g = 0, block = 0; g < groups; ++g) {
    const Wide scale = read_wide<S>(record), offset = OFFSETS ? read_wide<S>(record + HEADER) : Wide{};
    record += OFFSETS ? 2 * HEADER : HEADER;
    for (int64_t end = (g + 1) * weight.group / BLOCK; block < end; ++block) {
      Integers sum[ROWS][PARTS];
      for (int row = 0; row < ROWS; ++row)
        for (int64_t p = 0; p < PARTS; ++p)
          sum[row][p] = Integers{} - (OFFSETS ? 0 : middle * x.totals[row * blocks + block]);
#pragma GCC unroll 8
      for (int64_t i = 0; i < BLOCK; i += CODES, record += TILE * WORD) {
        for (int64_t p = 0; p < PARTS; ++p) {
          const Bytes word = read<Bytes>(record + p * LANES * WORD);
          for (int row = 0; row < ROWS; ++row) {
            const int8_t* codes = x.codes + row * weight.in + block * BLOCK + i;
            sum[row][p] = multiplied(sum[row][p], BITS == 8 ? word : word & 15, read<int32_t>(codes));
            if (BITS == 4) sum[row][p] = multiplied(sum[row][p], upper_halves(word), read<int32_t>(codes + WORD));
          }
        }
      }
      for (int row = 0; row < ROWS; ++row) {
        const float factor = x.factors[row * blocks + block];
        for (int64_t p = 0; p < PARTS; ++p) {
          totals[row].part[p] += scale.part[p] * factor * floats(sum[row][p]);
          if (OFFSETS) totals[row].part[p] += offset.part[p] * (factor * x.totals[row * blocks + block]);
        }
      }
    }
  }
}

#endif

}  // namespace
