// A quantised weight as products read it, from the first byte to the last: tiles of 16 output features. Of a tile,
// group after group of input features: 16 scales, 16 offsets where there are some, and codes, so that a word of 4 bytes
// is of one output feature and 16 words side by side are of all of them. A word holds the codes of 4 neighbouring input
// features, or, of 4 bits, of 8: the first four in the lower halves of its bytes. See packed.py, which makes it.

#pragma once

#include "numbers.h"
#include "team.h"

namespace {

constexpr int64_t TILE = 16;
constexpr int64_t WORD = 4;
constexpr int64_t BLOCK = 32;           // groups are whole blocks; activations are rounded by blocks
constexpr int64_t PARTS = TILE / LANES;  // vectors that 16 words take

}  // namespace

// A code is worth scale * code + offset, or scale * (code - middle) where there are no offsets.
extern "C" struct Packed {
  const uint8_t* tiles;  // [ceil(out / TILE), in / group, record]
  int64_t out, in, group, bits, middle;
  int64_t has_offsets;
  int64_t halves;  // whether scales and offsets are float16, and not float32
};

extern "C" struct Dequantize {
  Packed weight;
  void* out;  // [out, in]
};

extern "C" struct Lookup {
  Packed weight;
  const int32_t* ids;  // [rows], below weight.out
  void* out;           // [rows, in]
  int64_t rows;
};

extern "C" struct Copy {
  const uint8_t* table;  // [any, size]
  const int32_t* ids;    // [rows]
  uint8_t* out;          // [rows, size]
  int64_t rows, size;    // size: bytes of a row
};

namespace {

inline int64_t header_bytes(const Packed& weight) {
  return TILE * (weight.halves ? 2 : 4) * (weight.has_offsets ? 2 : 1);
}

inline int64_t record_bytes(const Packed& weight) {
  return header_bytes(weight) + TILE * weight.group * weight.bits / 8;
}

inline int64_t tile_bytes(const Packed& weight) { return weight.in / weight.group * record_bytes(weight); }

inline int64_t tiles_of(const Packed& weight) { return (weight.out + TILE - 1) / TILE; }

inline float number(const Packed& weight, const uint8_t* record, int64_t index) {
  return weight.halves ? load(read<float16>(record + 2 * index)) : read<float>(record + 4 * index);
}

// One output feature of one group, [group], a block at a time.
template <typename T>
inline void dequantize_group(const Packed& weight, const uint8_t* record, int64_t feature, T* out) {
  const float scale = number(weight, record, feature);
  const float offset = weight.has_offsets ? number(weight, record, TILE + feature) : 0.0f;
  const int32_t middle = weight.has_offsets ? 0 : static_cast<int32_t>(weight.middle);
  const uint8_t* words = record + header_bytes(weight) + feature * WORD;
  for (int64_t block = 0; block < weight.group; block += BLOCK, words += TILE * BLOCK * weight.bits / 8) {
    uint8_t codes[BLOCK];
    if (weight.bits == 8) {
      for (int64_t i = 0; i < BLOCK; i += WORD) std::memcpy(codes + i, words + i * TILE, WORD);
    } else {
      for (int64_t i = 0; i < BLOCK; i += 2 * WORD) {
        const uint32_t word = read<uint32_t>(words + i / 2 * TILE);
        const uint32_t lower = word & 0x0f0f0f0f, upper = word >> 4 & 0x0f0f0f0f;
        std::memcpy(codes + i, &lower, WORD);
        std::memcpy(codes + i + WORD, &upper, WORD);
      }
    }
    T* to = out + block;
#pragma omp simd
    for (int64_t i = 0; i < BLOCK; ++i) store(to[i], scale * static_cast<float>(codes[i] - middle) + offset);
  }
}

template <typename T>
void dequantize(const void* arguments, const Team& team) {
  const Dequantize& of = *static_cast<const Dequantize*>(arguments);
  const Packed& weight = of.weight;
  team.share(tiles_of(weight), [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const uint8_t* record = weight.tiles + tile * tile_bytes(weight);
      const int64_t features = std::min(TILE, weight.out - tile * TILE);
      T* out = static_cast<T*>(of.out) + tile * TILE * weight.in;
      for (int64_t i = 0; i < weight.in; i += weight.group, record += record_bytes(weight))
        for (int64_t feature = 0; feature < features; ++feature)
          dequantize_group(weight, record, feature, out + feature * weight.in + i);
    }
  });
}

template <typename T>
void lookup(const void* arguments, const Team& team) {
  const Lookup& of = *static_cast<const Lookup*>(arguments);
  const Packed& weight = of.weight;
  team.share(of.rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const uint8_t* record = weight.tiles + of.ids[row] / TILE * tile_bytes(weight);
      T* out = static_cast<T*>(of.out) + row * weight.in;
      for (int64_t i = 0; i < weight.in; i += weight.group, record += record_bytes(weight))
        dequantize_group(weight, record, of.ids[row] % TILE, out + i);
    }
  });
}

inline void copied(const void* arguments, const Team& team) {
  const Copy& copy = *static_cast<const Copy*>(arguments);
  team.share(copy.rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      std::memcpy(copy.out + row * copy.size, copy.table + copy.ids[row] * copy.size, copy.size);
  });
}

}  // namespace
