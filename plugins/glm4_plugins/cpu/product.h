// y = x W^T + bias for float x and a W of 8- or 4-bit numbers in blocks under one scale, in integers.
//
// x is rounded to int8 row by row, in the blocks of W, each under its own scale; a block's products are summed in
// int32 and their sum scaled into a float. Every element is computed in one order whatever the number of rows, so a
// row of a batch has the bits that it has alone.
//
// W [columns, width] lies in panels of 64 columns, padded with zeros: for each panel and block the numbers
// [block / 4][64 columns][4 inputs], unsigned with their zero in the middle. Of 4-bit numbers, a byte holds in its low
// half the number of one such group and in its high half that of the next: [block / 8][64][4]. Scales are bfloat16
// [panels][blocks][64].
#pragma once

#include <cstddef>
#include <cstdint>

namespace glm4 {

constexpr int kPanel = 64;   // columns
constexpr int kRows = 48;    // of x that pass over a panel together: they, and their sums, stay in a core's own cache

struct Weights {
  const uint8_t* numbers;
  const uint16_t* scales;  // bfloat16
  const float* bias;       // [columns], or null
  int64_t columns, width;
  int bits, block;

  int64_t blocks() const { return (width + block - 1) / block; }
  int64_t panels() const { return (columns + kPanel - 1) / kPanel; }
  size_t block_bytes() const { return size_t(block) * kPanel * bits / 8; }
  int zero() const { return 1 << (bits - 1); }
};

// kRows rows of x, rounded, as they pass over a panel: numbers [blocks][kRows][block], scales and starts
// [blocks][kRows]. A start is what a block's products come to on the zero of W, negated: the sum of integers starts
// from it. (Row by row, rows would lie 4096 bytes apart, and push each other out of the cache.)
struct Rounded {
  int8_t* numbers;
  float* scales;
  int32_t* starts;
};

// Rounds a row into place `row` < kRows.
using RoundRow = void (*)(const Weights&, const float* x, const Rounded&, int row);
// Adds `rows` <= kRows rows times one panel to `sums` [rows][64].
using MultiplyPanel = void (*)(const Weights&, const Rounded&, int rows, int64_t panel, float* sums);
// In place of gate: silu(gate) * up.
using Gate = void (*)(float* gate, const float* up, int count);

}  // namespace glm4
