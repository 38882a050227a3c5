// y = x W^T + bias in integer arithmetic, for float x and 8-bit or 4-bit W with one scale per block.
//
// x is quantized to int8, with one scale per row and block of W. The products of a block are summed in int32, and the
// sum is scaled to float. The order of summation does not depend on the number of rows. So a row has the same bits
// alone and in a batch.
//
// W [columns, width] is stored in panels of 64 columns, padded with zeros. For each panel and block, the numbers are
// [block / 4][64 columns][4 inputs], unsigned with the zero point in the middle of the range. With 4 bits, a byte holds
// two numbers: the low half from one group of 4 inputs, the high half from the next group. The shape is then
// [block / 8][64][4]. Scales are [panels][blocks][64]. Zero points, if any, are int8 [panels][blocks][64]: the distance
// of a block's zero point from the middle of the range.
#pragma once

#include <cstddef>
#include <cstdint>

namespace glm4 {

constexpr int kPanel = 64;   // columns
constexpr int kRows = 48;    // rows of x multiplied with a panel together; rows and sums fit a core's private cache

enum class ScaleType { kBfloat16, kFloat16, kFloat32 };

struct Weights {
  const uint8_t* numbers;
  const void* scales;
  ScaleType scale_type;
  const int8_t* zeros;  // or null
  const float* bias;    // [columns], or null
  int64_t columns, width;
  int bits, block;

  int64_t blocks() const { return (width + block - 1) / block; }
  int64_t panels() const { return (columns + kPanel - 1) / kPanel; }
  size_t block_bytes() const { return size_t(block) * kPanel * bits / 8; }
  int zero() const { return 1 << (bits - 1); }
  // Whether the kernels read the scales as they are stored. Other weights are widened first, a block at a time.
  bool plain() const { return zeros == nullptr && scale_type == ScaleType::kBfloat16; }
};

// kRows quantized rows of x: numbers [blocks][kRows][block], scales and starts [blocks][kRows]. A start is the initial
// value of a block's int32 sum, -(zero point of W) * (sum of the block's numbers of x). Blocks come first in memory,
// because whole rows would be 4096 bytes apart and evict each other from the cache.
struct Rounded {
  int8_t* numbers;
  float* scales;
  int32_t* starts;
};

// Quantizes one row of x and stores it as row `row` < kRows.
using RoundRow = void (*)(const Weights&, const float* x, const Rounded&, int row);
// Multiplies `rows` <= kRows rows with one panel, and adds the products to `sums` [rows][64].
using MultiplyPanel = void (*)(const Weights&, const Rounded&, int rows, int64_t panel, float* sums);
// Replaces gate by silu(gate) * up.
using Gate = void (*)(float* gate, const float* up, int count);

}  // namespace glm4
