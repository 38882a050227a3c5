// glm4::PartialRopeGqaAttention on a CPU: rotates queries and keys, stores new cache rows, computes causal attention.
//
// Attention is computed with an online softmax over chunks of 256 keys, counted from the start of the sequence. A chunk
// gives each row its largest score, the sum of its weights, and the weighted sum of the values. Chunks are merged in
// order. So a row always has the same bits: alone, in a batch, in a whole or split prompt, with any number of threads.
// The exception is NaN or infinity in a later token of the same piece: its weight is zero, and zero times NaN or
// infinity is NaN.
//
// The cache is float32, or int8 with a scale per head and channel. An int8 number is round(x / scale). The scales are
// multiplied into the queries and into the result, so the numbers need no dequantization.
#pragma once

#include <cstddef>
#include <cstdint>

namespace glm4 {

constexpr int kChunk = 256;         // keys of a chunk
constexpr int kKeys = 64;           // keys of a chunk that are transposed together
constexpr int kRowsTogether = 96;   // most rows of one piece of work; a row is one query head of one position
constexpr int kWidest = 16;         // floats in the widest register; scratch rows are padded to a multiple

struct AttentionShape {
  int64_t batch, sequence, capacity, kv_heads, group, dim;
  int64_t rotary, positions;  // rotated dims of a head, rows of the cos and sin tables
  float scale;
  bool quantized;

  int64_t padded() const { return (dim + kWidest - 1) / kWidest * kWidest; }
  int64_t together() const {  // positions of one piece of work
    const int64_t fit = kRowsTogether / group;
    return fit < 1 ? 1 : fit < sequence ? fit : sequence;
  }
  int64_t pieces() const { return (sequence + together() - 1) / together(); }
};

struct AttentionData {
  const float *query, *key, *value;         // [batch, sequence, heads * dim]
  const float *cos, *sin;                   // [positions, rotary / 2]
  const int32_t *past, *lengths;            // [batch]: cached and new positions; past null: the cache is empty
  void *keys, *values;                      // the cache [batch, kv_heads, capacity, dim], modified
  const float *key_scales, *value_scales;   // [kv_heads, dim], only for an int8 cache
  float* output;                            // [batch, sequence, kv_heads * group * dim]

  int64_t past_of(int64_t b) const { return past == nullptr ? 0 : past[b]; }
};

// Partial softmax of some rows over some keys. For each row: the largest score, the sum of the weights
// exp(score - largest), and the weighted sum of the values [rows][padded].
struct Partial {
  float *most, *total, *sums;
};

// Input of `Attend`: queries [rows][padded], and `count` keys and values of one head. Row r belongs to position
// r / group. The rows of the first position see `first` keys; the rows of each later position see one key more.
struct Attended {
  const float* queries;
  int rows, group;
  const void *keys, *values;
  int first, count;
};

// Working memory of one thread, in floats.
struct AttentionScratch {
  float* columns;  // [dim][kKeys]: transposed keys
  float* values;   // [kChunk][padded]: values as padded float32, if the cache cannot be read directly
  float* scores;   // [kRowsTogether or group][kChunk]
};

// Stores a key or value of one head as a row of the cache. `cos` null: no rotation. `scales` null: a float32 cache.
using StoreRow = void (*)(const AttentionShape&, const float* x, const float* cos, const float* sin,
                          const float* scales, void* row);
// Rotates and scales the queries of one position and one kv head, into [group][padded].
using TurnQueries = void (*)(const AttentionShape&, const float* x, const float* cos, const float* sin,
                             const float* key_scales, float* queries);
using Attend = void (*)(const AttentionShape&, const Attended&, const AttentionScratch&, const Partial&);
// Merges a later chunk's partial into `into`, for rows `from` ... rows - 1.
using Merge = void (*)(const AttentionShape&, int from, int rows, const Partial& into, const Partial& later);
// Writes one position's output [group * dim]: the sums divided by the totals, times the value scales.
using Finish = void (*)(const AttentionShape&, const Partial&, int row, const float* value_scales, float* output);

struct AttentionKernels {
  StoreRow store_row;
  TurnQueries turn_queries;
  Attend attend;
  Merge merge;
  Finish finish;
};

}  // namespace glm4
