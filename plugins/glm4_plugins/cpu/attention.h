// glm4::PartialRopeGqaAttention on a CPU: rotates queries and keys, stores new cache rows, computes causal attention.
//
// Attention is computed with an online softmax over chunks of 256 keys, counted from the start of the sequence. A chunk
// gives each row its largest score, the sum of its weights, and the weighted sum of the values. Chunks are merged in
// order. So a row always has the same bits: alone, in a batch, in a whole or split prompt, with any number of threads.
// The exception is NaN or infinity in a later token of the same piece: its weight is zero, and zero times NaN or
// infinity is NaN.
//
// The cache is float32, float16, bfloat16 or int8. New keys and values are rounded as they are stored, and attention
// reads only stored numbers, also for the new tokens. So the cut of a prompt does not change a bit.
//
// float16 and bfloat16 are widened to float32 in registers. A number beyond float16's range becomes 65504 or -65504.
//
// A row of the int8 cache is one key or value of one head: `dim` numbers, and a float32 scale in the next 4 bytes. The
// scale is the row's largest magnitude / 127, and a number is round(x / scale). Keys are first divided by a fixed factor
// per head and channel, and queries are multiplied by the same factor. So a channel that is large in every key does not
// take the other channels' precision. Queries, and weights times the values' scales, are rounded to 16 bits. Both
// products are then sums of integers, which are exact in any order.
#pragma once

#include <cstddef>
#include <cstdint>

namespace glm4 {

constexpr int kChunk = 256;         // keys of a chunk
constexpr int kKeys = 64;           // keys of a chunk that are transposed together
constexpr int kRowsTogether = 96;   // most rows of one piece of work; a row is one query head of one position
constexpr int kWidest = 16;         // floats in the widest register; scratch rows are padded to a multiple

enum class CacheType { kFloat32, kFloat16, kBfloat16, kInt8 };

constexpr bool is_half(CacheType type) { return type == CacheType::kFloat16 || type == CacheType::kBfloat16; }

// Elements of a cache row of one head, and their bytes. An int8 row ends with its scale.
constexpr int64_t row_elements(CacheType type, int64_t dim) {
  return type == CacheType::kInt8 ? dim + int64_t(sizeof(float)) : dim;
}
constexpr size_t element_bytes(CacheType type) {
  return type == CacheType::kInt8 ? 1 : is_half(type) ? 2 : sizeof(float);
}

struct AttentionShape {
  int64_t batch, sequence, capacity, kv_heads, group, dim;
  int64_t rotary, positions;  // rotated dims of a head, rows of the cos and sin tables
  float scale;
  CacheType cache;

  size_t row_bytes() const { return size_t(row_elements(cache, dim)) * element_bytes(cache); }
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
  void *keys, *values;                      // the cache [batch, kv_heads, capacity, row_elements], modified
  const float* factors;                     // [kv_heads, dim] of the keys, only for an int8 cache
  float* output;                            // [batch, sequence, kv_heads * group * dim]

  int64_t past_of(int64_t b) const { return past == nullptr ? 0 : past[b]; }
};

// Partial softmax of some rows over some keys. For each row: the largest score, the sum of the weights
// exp(score - largest), and the weighted sum of the values [rows][padded].
struct Partial {
  float *most, *total, *sums;
};

// Input of `Attend`: rows of queries from `TurnQueries`, and `count` keys and values of one head. Row r belongs to position
// r / group. The rows of the first position see `first` keys; the rows of each later position see one key more.
struct Attended {
  const float* queries;
  int rows, group;
  const void *keys, *values;
  int first, count;
};

// Working memory of one thread, in floats.
struct AttentionScratch {
  float* columns;  // [dim][kKeys]: transposed keys; with an int8 cache, pairs of int16 [(dim + 1) / 2][kKeys]
  float* values;   // [kChunk][padded]: values as padded float32, or pairs of int16 [kChunk / 2][padded]
  float* scores;   // [kRowsTogether or group][kChunk]
};

// Stores a key or value of one head as a row of the cache. `cos` null: no rotation. `factors` null: all are 1. `work`:
// [dim] for intermediate results.
using StoreRow = void (*)(const AttentionShape&, const float* x, const float* cos, const float* sin,
                          const float* factors, float* work, void* row);
// Rotates and scales the queries of one position and one kv head, into [group][padded] floats. With an int8 cache, a
// row is pairs of int16, and its scale is the last float.
using TurnQueries = void (*)(const AttentionShape&, const float* x, const float* cos, const float* sin,
                             const float* factors, float* queries);
using Attend = void (*)(const AttentionShape&, const Attended&, const AttentionScratch&, const Partial&);
// Merges a later chunk's partial into `into`, for rows `from` ... rows - 1.
using Merge = void (*)(const AttentionShape&, int from, int rows, const Partial& into, const Partial& later);
// Writes one position's output [group * dim]: the sums divided by the totals.
using Finish = void (*)(const AttentionShape&, const Partial&, int row, float* output);

struct AttentionKernels {
  StoreRow store_row;
  TurnQueries turn_queries;
  Attend attend;
  Merge merge;
  Finish finish;
};

}  // namespace glm4
