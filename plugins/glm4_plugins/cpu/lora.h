// y + (x A) B for rows of several LoRA adapters, with A and B in float16.
//
// Each element of a result is a sum in a fixed order: over the inputs of a chunk in four interleaved sums, over the
// chunks in order, then over the ranks in order. The order depends neither on the number of rows, nor on the other
// rows, nor on the instruction set. So a row has the same bits alone and in any batch.
//
// A is stored as [inputs][rank]. B is stored in panels of 64 columns, [panels][rank][64], padded with zeros. B follows
// A in memory, so that a kernel may read a few elements past the end of A.
#pragma once

#include <cstdint>

namespace glm4 {

constexpr int kLoraRows = 4;      // rows that a kernel multiplies together
constexpr int kLoraLanes = 16;    // a row of narrow sums is padded to a multiple of this number
constexpr int kLoraChunk = 1024;  // inputs that one thread sums

inline int64_t lora_stride(int64_t rank) { return (rank + kLoraLanes - 1) / kLoraLanes * kLoraLanes; }

// Stores x A for `rows` <= kLoraRows rows of x and `inputs` rows of A, as narrow [rows][stride]. x: where each row is.
using LoraNarrow = void (*)(const float* const* x, int rows, const uint16_t* a, int64_t inputs, int64_t rank,
                            float* narrow, int64_t stride);
// Adds narrow B to sums [rows][64], for one panel of B.
using LoraWiden = void (*)(const float* narrow, int64_t stride, int rows, const uint16_t* b, int64_t rank, float* sums);

struct LoraKernels {
  LoraNarrow narrow;
  LoraWiden widen;
};

}  // namespace glm4
