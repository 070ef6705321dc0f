// A linear layer over a quantised weight, with what stands before and after it.

#pragma once

#include <vector>

#include "dot.h"

// What becomes of x before it is multiplied.
enum Before : int64_t { NOTHING, RMS_NORM, SILU_GATE };

extern "C" struct Product {
  Packed weight;
  const void* x;         // [rows, in]; before a gate [rows, 2 * in]
  const void* norm;      // [in]: of RMS_NORM
  const void* bias;      // [out]; null: none
  const void* residual;  // [rows, out]; null: none
  void* out;             // [rows, out]
  int64_t rows;
  int64_t before;
  int64_t rounds;  // whether activations are rounded to 8 bits
  float eps;       // of RMS_NORM
};

namespace {

// Activations of some rows as a product wants them, each thread its own: waiting for each other would cost more than it
// saves.
struct Prepared {
  std::vector<float> wide, sums;  // [rows, in], and sums of groups [rows, in / group]
  std::vector<int8_t> codes;
  std::vector<float> factors;
  std::vector<int32_t> totals;

  Rounded rounded(int64_t row, int64_t in) {
    return {codes.data() + row * in, factors.data() + row * (in / BLOCK), totals.data() + row * (in / BLOCK)};
  }
};

// Rows first to first + rows of a product's.
template <typename T>
void prepare(const Product& product, int64_t first, int64_t rows, Prepared& to) {
  const int64_t in = product.weight.in, group = product.weight.group;
  const T* x = static_cast<const T*>(product.x) + first * in * (product.before == SILU_GATE ? 2 : 1);
  to.wide.resize(rows * in);
  to.codes.resize(rows * in);
  to.factors.resize(rows * in / BLOCK);
  to.totals.resize(rows * in / BLOCK);
  to.sums.resize(rows * in / group);
  for (int64_t row = 0; row < rows; ++row) {
    float* wide = to.wide.data() + row * in;
    if (product.before == RMS_NORM) {
      rms_normed(x + row * in, static_cast<const T*>(product.norm), wide, in, product.eps);
    } else if (product.before == SILU_GATE) {
      silu_gated(x + 2 * row * in, wide, in);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < in; ++i) wide[i] = load(x[row * in + i]);
    }
    if (product.rounds) {
      round_row(wide, in, to.rounded(row, in));
      continue;
    }
    for (int64_t g = 0; g < in / group; ++g) {
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < group; ++i) sum += wide[g * group + i];
      to.sums[row * (in / group) + g] = sum;
    }
  }
}

// Sums of a tile for some rows of x, from row on.
using Dot = void (*)(const Product& product, const uint8_t* record, Prepared& x, int64_t row, Wide* totals);

template <int BITS, typename S, bool OFFSETS, int ROWS>
void dot_of(const Product& product, const uint8_t* record, Prepared& x, int64_t row, Wide* totals) {
  const Packed& weight = product.weight;
#if MULTIPLIES_BYTES
  if (product.rounds) return dot<BITS, ROWS, S, OFFSETS>(weight, record, x.rounded(row, weight.in), totals);
#endif
  dot<BITS, ROWS, S, OFFSETS>(weight, record, x.wide.data() + row * weight.in,
                              x.sums.data() + row * (weight.in / weight.group), totals);
}

template <int ROWS, int BITS, typename S>
Dot dot_for(const Packed& weight) {
  return weight.has_offsets ? dot_of<BITS, S, true, ROWS> : dot_of<BITS, S, false, ROWS>;
}

template <int ROWS>
Dot dot_for(const Packed& weight) {
  if (weight.bits == 8) return weight.halves ? dot_for<ROWS, 8, float16>(weight) : dot_for<ROWS, 8, float>(weight);
  return weight.halves ? dot_for<ROWS, 4, float16>(weight) : dot_for<ROWS, 4, float>(weight);
}

// What a tile gave for one row goes out: features of it are there.
template <typename T>
inline void put(const Product& product, const Wide& total, int64_t row, int64_t first, int64_t features) {
  float sums[TILE];
  std::memcpy(sums, &total, sizeof sums);
  const int64_t at = row * product.weight.out + first;
  for (int64_t i = 0; i < features; ++i) {
    if (product.bias != nullptr) sums[i] += load(static_cast<const T*>(product.bias)[first + i]);
    if (product.residual != nullptr) sums[i] += load(static_cast<const T*>(product.residual)[at + i]);
    store(static_cast<T*>(product.out)[at + i], sums[i]);
  }
}

constexpr int64_t CHUNK = 32;  // rows whose activations a core's nearest cache holds

// Some tiles for some rows.
template <typename T>
void linear_part(const Product& product, int64_t first_row, int64_t rows, int64_t first_tile, int64_t last_tile) {
  const Packed& weight = product.weight;
  thread_local Prepared x;
  prepare<T>(product, first_row, rows, x);
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    const uint8_t* record = weight.tiles + tile * tile_bytes(weight);
    const int64_t first = tile * TILE, features = std::min(TILE, weight.out - first);
    for (int64_t row = 0, count; row < rows; row += count) {
      count = rows - row >= MOST_ROWS ? MOST_ROWS : rows - row >= SOME_ROWS ? SOME_ROWS : 1;
      const Dot dot = count == 1           ? dot_for<1>(weight)
                      : count == SOME_ROWS ? dot_for<SOME_ROWS>(weight)
                                           : dot_for<MOST_ROWS>(weight);
      Wide totals[MOST_ROWS] = {};
      dot(product, record, x, row, totals);
      for (int64_t r = 0; r < count; ++r) put<T>(product, totals[r], first_row + row + r, first, features);
    }
  }
}

// Few rows are shared out by tiles, so that a weight is read once; many by chunks, so that a row is prepared once.
template <typename T>
void linear(const void* arguments, const Team& team) {
  const Product& product = *static_cast<const Product*>(arguments);
  const int64_t chunks = (product.rows + CHUNK - 1) / CHUNK, tiles = tiles_of(product.weight);
  const int64_t columns = chunks >= 2 * team.threads() ? 1 : std::min(team.threads(), tiles);
  team.share(chunks * columns, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t chunk = part % chunks, column = part / chunks, row = chunk * CHUNK;
      linear_part<T>(product, row, std::min(CHUNK, product.rows - row), tiles * column / columns,
                     tiles * (column + 1) / columns);
    }
  });
}

}  // namespace
