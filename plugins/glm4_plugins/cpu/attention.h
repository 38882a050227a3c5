// glm4::PartialRopeGqaAttention on a processor: rotation, the cache's new rows, and causal attention over it.
//
// Keys are attended to in chunks of 256 from the sequence's start. For each chunk a row gets its largest score, the sum
// of its weights and the weighted sum of the values by themselves, and these are merged chunk after chunk. So a row
// has the same bits alone, in a batch, in a prompt, in a part of one, and on any number of threads: a row of finite
// numbers, that is. The weights of what a row does not see are zeros, and zero times a NaN or an infinity of a later
// token of the same piece is NaN.
//
// The cache is float32, or int8 with a scale per head and channel: a stored number is round(x / scale), and the scales
// are folded into the queries and into the result, so that the numbers are read as they are.
#pragma once

#include <cstddef>
#include <cstdint>

namespace glm4 {

constexpr int kChunk = 256;         // keys that are merged at once
constexpr int kKeys = 64;           // of these, as many as are turned into columns together
constexpr int kRowsTogether = 96;   // rows of one piece of work, a row being a head of a position
constexpr int kWidest = 16;         // floats in a register of any kernel set; scratch rows are padded to it

struct AttentionShape {
  int64_t batch, sequence, capacity, kv_heads, group, dim;
  int64_t rotary, positions;  // dims that are rotated, rows of the tables
  float scale;
  bool quantized;

  int64_t padded() const { return (dim + kWidest - 1) / kWidest * kWidest; }
  int64_t together() const {  // positions of one piece
    const int64_t fit = kRowsTogether / group;
    return fit < 1 ? 1 : fit < sequence ? fit : sequence;
  }
  int64_t pieces() const { return (sequence + together() - 1) / together(); }
};

struct AttentionData {
  const float *query, *key, *value;         // [batch, sequence, heads * dim]
  const float *cos, *sin;                   // [positions, rotary / 2]
  const int32_t *past, *lengths;            // [batch]; past may be null: nothing is
  void *keys, *values;                      // the cache [batch, kv_heads, capacity, dim], written into
  const float *key_scales, *value_scales;   // [kv_heads, dim], of an int8 cache
  float* output;                            // [batch, sequence, kv_heads * group * dim]

  int64_t past_of(int64_t b) const { return past == nullptr ? 0 : past[b]; }
};

// What some rows make of some keys: per row the largest score, the sum of the weights exp(score - largest), and the sum
// of the values under these weights, [rows][padded].
struct Partial {
  float *most, *total, *sums;
};

// `rows` queries [rows][padded], row r of position r / group, over `count` keys and values of one head from `keys` and
// `values` on; the rows of the first position see `first` of them, those of each next one more.
struct Attended {
  const float* queries;
  int rows, group;
  const void *keys, *values;
  int first, count;
};

// Memory that one thread works in; sizes in floats.
struct AttentionScratch {
  float* columns;  // [dim][kKeys]: keys, turned
  float* values;   // [kChunk][padded]: values, where they are not read in place
  float* scores;   // [kRowsTogether or group][kChunk]
};

// A row of the cache from a key or value of one head; `cos` null where it is not rotated, `scales` where not quantized.
using StoreRow = void (*)(const AttentionShape&, const float* x, const float* cos, const float* sin,
                          const float* scales, void* row);
// Queries of one position and kv head, rotated and scaled, [group][padded].
using TurnQueries = void (*)(const AttentionShape&, const float* x, const float* cos, const float* sin,
                             const float* key_scales, float* queries);
using Attend = void (*)(const AttentionShape&, const Attended&, const AttentionScratch&, const Partial&);
// Adds a later chunk's partial to `into`, for rows `from` ... rows - 1.
using Merge = void (*)(const AttentionShape&, int from, int rows, const Partial& into, const Partial& later);
// One position's rows, divided by their totals, [group * dim].
using Finish = void (*)(const AttentionShape&, const Partial&, int row, const float* value_scales, float* output);

struct AttentionKernels {
  StoreRow store_row;
  TurnQueries turn_queries;
  Attend attend;
  Merge merge;
  Finish finish;
};

}  // namespace glm4
