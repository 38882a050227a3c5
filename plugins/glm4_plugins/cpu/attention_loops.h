// The attention kernels for registers of kLanes floats. The including file must include loops.h first, and define:
// `Lanes` and `Ints` (vector types of float and int32_t), `kLanes`, `kTileRows` and `kTileVectors` (a tile of sums that
// fits the registers), `fused` (a * b + c of floats; for Ints, each element has two int16 numbers, and both products are
// added to c), `halves` (kLanes float16 numbers to float).

#include <cmath>
#include <cstring>
#include <type_traits>

#include "attention.h"
#include "attention_tiles.h"

namespace glm4 {
namespace {

// Elements of a cache as they are stored.
struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

template <typename T, size_t kBytes>
struct VectorType {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <typename T, size_t kBytes>
using Vector = typename VectorType<T, kBytes>::type;

template <typename To, typename From>
inline To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "another size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// A register of 32-bit units from cache elements: one element as a float, or two int8 numbers as int16.
inline Lanes widen(const float* from) { return load(from); }
inline Lanes widen(const Half* from) { return halves(&from->bits); }
inline Lanes widen(const Bfloat* from) {
  Vector<uint16_t, sizeof(Lanes) / 2> bits;
  std::memcpy(&bits, from, sizeof bits);
  return same_bits<Lanes>(__builtin_convertvector(bits, Vector<uint32_t, sizeof(Lanes)>) << 16);
}
inline Lanes widen(const int8_t* from) {
  Vector<int8_t, sizeof(Lanes) / 2> numbers;
  std::memcpy(&numbers, from, sizeof numbers);
  return same_bits<Lanes>(__builtin_convertvector(numbers, Vector<int16_t, sizeof(Lanes)>));
}

template <typename T>
constexpr int kInUnit = std::is_same_v<T, int8_t> ? 2 : 1;  // elements of a unit

// Widens `count` elements, padded with zeros.
template <typename T>
inline Lanes widen(const T* from, int count) {
  if (count >= kLanes * kInUnit<T>) return widen(from);
  T whole[kLanes * kInUnit<T>] = {};
  std::memcpy(whole, from, size_t(count) * sizeof(T));
  return widen(whole);
}

// Transposes `count` keys, rows of `dim` elements, into units [units][kKeys], padded with zeros to whole registers.
template <typename T>
void turn_keys(const char* keys, size_t row_bytes, int count, int dim, float* columns) {
  const int units = (dim + kInUnit<T> - 1) / kInUnit<T>;
  for (int j = 0; j < count; j += kLanes)
    for (int d = 0; d < units; d += kLanes) {
      Lanes rows[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const T* row = reinterpret_cast<const T*>(keys + size_t(j + i) * row_bytes);
        rows[i] = j + i < count ? widen(row + d * kInUnit<T>, dim - d * kInUnit<T>) : Lanes{};
      }
      turn(rows);
      for (int i = 0; i < kLanes && d + i < units; ++i) store(columns + (d + i) * kKeys + j, rows[i]);
    }
}

template <typename T>
void widen_values(const T* values, int count, int dim, int64_t padded, float* wide) {
  for (int j = 0; j < count; ++j)
    for (int d = 0; d < padded; d += kLanes) {
      const int left = dim - d;
      store(wide + j * padded + d, left > 0 ? widen(values + int64_t(j) * dim + d, left) : Lanes{});
    }
}

// kLanes int8 numbers, the last ones zero where fewer are left.
inline Ints numbers_of(const char* from, int left) {
  Vector<int8_t, sizeof(Lanes) / 4> numbers = {};
  if (left >= kLanes)
    std::memcpy(&numbers, from, sizeof numbers);
  else if (left > 0)
    std::memcpy(&numbers, from, size_t(left));
  return __builtin_convertvector(numbers, Ints);
}

// Values of consecutive keys side by side, as pairs of int16 [(count + 1) / 2][padded].
void pair_values(const char* values, size_t row_bytes, int count, int dim, int64_t padded, int32_t* pairs) {
  for (int j = 0; j < count; j += 2, values += 2 * row_bytes, pairs += padded)
    for (int d = 0; d < padded; d += kLanes) {
      const Ints first = numbers_of(values + d, dim - d);
      const Ints second = j + 1 < count ? numbers_of(values + row_bytes + d, dim - d) : Ints{};
      store(pairs + d, (first & 0xffff) | (second << 16));
    }
}

// The scales at the ends of int8 rows.
inline void read_scales(const char* rows, size_t row_bytes, int count, int dim, float* scales) {
  for (int j = 0; j < count; ++j) std::memcpy(scales + j, rows + size_t(j) * row_bytes + dim, sizeof(float));
}

// How numbers are rounded to integers: x is about number * scale. A scale of NaN stands for numbers that are not finite.
struct Rounding {
  float scale, inverse;
};

// For integers of at most `most`.
inline Rounding rounding_of(const float* x, int64_t count, float most) {
  int32_t bits = 0;  // magnitudes of floats order like their bits as integers, which compilers vectorize
  for (int64_t i = 0; i < count; ++i) {
    const int32_t each = int32_t(bits_of(x[i]) & 0x7fffffff);
    bits = each > bits ? each : bits;
  }
  const float largest = float_of(uint32_t(bits));
  if (!std::isfinite(largest)) return {NAN, 0.0f};
  return {largest / most, largest > kSmallest ? most / largest : 0.0f};
}

template <typename T>
inline void round_to(const float* x, int64_t count, float inverse, T* numbers) {
  if (inverse == 0.0f) {
    for (int64_t i = 0; i < count; ++i) numbers[i] = 0;
    return;
  }
  // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, ties to even.
  for (int64_t i = 0; i < count; ++i) numbers[i] = T(int32_t(x[i] * inverse + 12582912.0f - 12582912.0f));
}

// Turns the scores of one row into weights exp(score - largest), in place. The row sees `count` keys; later weights are
// zero, up to `all`, a multiple of kWidest.
inline void weigh(float* scores, int count, int all, float* most, float* total) {
  for (int j = count; j < all; ++j) scores[j] = -INFINITY;
  Lanes highest = load(scores);
  for (int j = kLanes; j < all; j += kLanes) {
    const Lanes some = load(scores + j);
    highest = some > highest ? some : highest;
  }
  float largest = -INFINITY;
  for (int i = 0; i < kLanes; ++i) largest = highest[i] > largest ? highest[i] : largest;
  for (int j = 0; j < all; ++j) scores[j] = exponential(scores[j] - largest);
  for (int j = count; j < all; ++j) scores[j] = 0.0f;
  Lanes apart[kWidest / kLanes] = {};  // always 16 sums, so that all kernel sets add in the same order
  for (int j = 0; j < all; j += kWidest)
    for (int v = 0; v < kWidest / kLanes; ++v) apart[v] += load(scores + j + v * kLanes);
  float sums[kWidest];
  std::memcpy(sums, apart, sizeof sums);
  for (int step = kWidest / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) sums[i] += sums[i + step];
  *most = largest;
  *total = sums[0];
}

inline int seen_by(const Attended& some, int row) {
  const int seen = some.first + row / some.group;
  return seen > some.count ? some.count : seen > 0 ? seen : 0;
}

// Scores of all rows and keys [rows][kChunk], as sums of T.
template <typename T, typename Element>
void score(const AttentionShape& shape, const Attended& some, float* columns, T* scores) {
  const int dim = int(shape.dim), units = (dim + kInUnit<Element> - 1) / kInUnit<Element>;
  const char* keys = static_cast<const char*>(some.keys);
  const T* queries = reinterpret_cast<const T*>(some.queries);
  for (int j = 0; j < some.count; j += kKeys) {
    const int count = some.count - j < kKeys ? some.count - j : kKeys;
    turn_keys<Element>(keys + size_t(j) * shape.row_bytes(), shape.row_bytes(), count, dim, columns);
    multiply(some.rows, queries, shape.padded(), reinterpret_cast<const T*>(columns), kKeys, scores + j, kChunk,
             (count + kLanes - 1) / kLanes, units);
  }
}

template <typename Element>
void attend_floats(const AttentionShape& shape, const Attended& some, const AttentionScratch& scratch,
                   const Partial& to) {
  const int dim = int(shape.dim);
  const int64_t padded = shape.padded();
  score<float, Element>(shape, some, scratch.columns, scratch.scores);
  const int all = (some.count + kWidest - 1) / kWidest * kWidest;
  for (int r = 0; r < some.rows; ++r)
    weigh(scratch.scores + r * kChunk, seen_by(some, r), all, to.most + r, to.total + r);
  const float* values = static_cast<const float*>(some.values);
  if (!std::is_same_v<Element, float> || padded != dim) {
    widen_values(static_cast<const Element*>(some.values), some.count, dim, padded, scratch.values);
    values = scratch.values;
  }
  multiply(some.rows, const_cast<const float*>(scratch.scores), kChunk, values, padded, to.sums, padded,
           int(padded) / kLanes, some.count);
}

// Turns integer scores into floats, in place.
inline void scale_scores(float* scores, const float* key_scales, float query_scale, int count) {
  for (int j = 0; j < count; ++j) {
    int32_t sum;
    std::memcpy(&sum, scores + j, sizeof sum);
    scores[j] = float(sum) * key_scales[j] * query_scale;
  }
}

constexpr float kMostWeight = 32767.0f;  // 256 weights times int8 values fit an int32

void attend_int8(const AttentionShape& shape, const Attended& some, const AttentionScratch& scratch,
                 const Partial& to) {
  const int dim = int(shape.dim), all = (some.count + kWidest - 1) / kWidest * kWidest;
  const int64_t padded = shape.padded();
  const char* values = static_cast<const char*>(some.values);
  int32_t* sums = reinterpret_cast<int32_t*>(to.sums);
  int32_t* scores = reinterpret_cast<int32_t*>(scratch.scores);
  float key_scales[kChunk], value_scales[kChunk];
  read_scales(static_cast<const char*>(some.keys), shape.row_bytes(), some.count, dim, key_scales);
  read_scales(values, shape.row_bytes(), some.count, dim, value_scales);
  score<int32_t, int8_t>(shape, some, scratch.columns, scores);
  for (int r = 0; r < some.rows; ++r) {
    float* row = scratch.scores + r * kChunk;
    const int seen = seen_by(some, r);
    scale_scores(row, key_scales, some.queries[(r + 1) * padded - 1], seen);
    weigh(row, seen, all, to.most + r, to.total + r);
    for (int j = 0; j < seen; ++j) row[j] *= value_scales[j];
    int16_t weights[kChunk] = {};
    const Rounding rounding = rounding_of(row, seen, kMostWeight);
    round_to(row, seen, rounding.inverse, weights);
    std::memcpy(row, weights, sizeof weights);
    row[kChunk - 1] = rounding.scale;
  }
  pair_values(values, shape.row_bytes(), some.count, dim, padded, reinterpret_cast<int32_t*>(scratch.values));
  multiply(some.rows, const_cast<const int32_t*>(scores), kChunk, reinterpret_cast<const int32_t*>(scratch.values),
           padded, sums, padded, int(padded) / kLanes, (some.count + 1) / 2);
  for (int r = 0; r < some.rows; ++r) {
    const float scale = scratch.scores[r * kChunk + kChunk - 1];
    for (int64_t d = r * padded; d < (r + 1) * padded; ++d) {
      int32_t sum;
      std::memcpy(&sum, to.sums + d, sizeof sum);
      to.sums[d] = float(sum) * scale;
    }
  }
}

void attend(const AttentionShape& shape, const Attended& some, const AttentionScratch& scratch, const Partial& to) {
  switch (shape.cache) {
    case CacheType::kFloat32: return attend_floats<float>(shape, some, scratch, to);
    case CacheType::kFloat16: return attend_floats<Half>(shape, some, scratch, to);
    case CacheType::kBfloat16: return attend_floats<Bfloat>(shape, some, scratch, to);
    case CacheType::kInt8: return attend_int8(shape, some, scratch, to);
  }
}

void merge(const AttentionShape& shape, int from, int rows, const Partial& into, const Partial& later) {
  const int64_t padded = shape.padded();
  for (int r = from; r < rows; ++r) {
    const float most = into.most[r] > later.most[r] ? into.most[r] : later.most[r];
    const float old = exponential(into.most[r] - most), young = exponential(later.most[r] - most);
    into.most[r] = most;
    into.total[r] = into.total[r] * old + later.total[r] * young;
    float* sums = into.sums + r * padded;
    const float* added = later.sums + r * padded;
    for (int64_t d = 0; d < padded; ++d) sums[d] = sums[d] * old + added[d] * young;
  }
}

void finish(const AttentionShape& shape, const Partial& partial, int row, float* output) {
  for (int64_t g = 0; g < shape.group; ++g, ++row, output += shape.dim) {
    const float* sums = partial.sums + row * shape.padded();
    const float total = partial.total[row];
    for (int64_t d = 0; d < shape.dim; ++d) output[d] = sums[d] / total;
  }
}

// Rotates the pairs (2i, 2i + 1) of the first `rotary` dims.
inline void rotate(const float* x, int64_t dim, int64_t rotary, const float* cos, const float* sin, float* y) {
  for (int64_t i = 0; i < rotary / 2; ++i) {
    const float even = x[2 * i], odd = x[2 * i + 1];
    y[2 * i] = even * cos[i] - odd * sin[i];
    y[2 * i + 1] = even * sin[i] + odd * cos[i];
  }
  for (int64_t d = rotary; d < dim; ++d) y[d] = x[d];
}

void store_row(const AttentionShape& shape, const float* x, const float* cos, const float* sin, const float* factors,
               float* work, void* row) {
  const int64_t dim = shape.dim;
  float* turned = shape.cache == CacheType::kFloat32 ? static_cast<float*>(row) : work;
  rotate(x, dim, cos == nullptr ? 0 : shape.rotary, cos, sin, turned);
  if (shape.cache == CacheType::kFloat32) return;
  if (is_half(shape.cache)) {
    uint16_t* bits = static_cast<uint16_t*>(row);
    const bool brief = shape.cache == CacheType::kBfloat16;
    for (int64_t d = 0; d < dim; ++d) bits[d] = brief ? bfloat_of_float(turned[d]) : half_of_float(turned[d]);
    return;
  }
  if (factors != nullptr)
    for (int64_t d = 0; d < dim; ++d) turned[d] /= factors[d];
  const Rounding rounding = rounding_of(turned, dim, 127.0f);
  round_to(turned, dim, rounding.inverse, static_cast<int8_t*>(row));
  std::memcpy(static_cast<char*>(row) + dim, &rounding.scale, sizeof(float));
}

// Largest magnitude of a query's int16 number: with int8 keys, the sum over `dim` fits an int32.
inline float most_query(int64_t dim) {
  const int64_t fits = INT32_MAX / (128 * dim);
  return fits < 32767 ? float(fits) : 32767.0f;
}

// Rounds a query in place, to pairs of int16 and a scale in the last float. A number takes half of a float's bytes, so
// it never overwrites a float that is still to be read.
inline void round_query(const AttentionShape& shape, float* query) {
  const Rounding rounding = rounding_of(query, shape.dim, most_query(shape.dim));
  for (int64_t d = 0; d < shape.padded(); d += kWidest) {
    int16_t numbers[kWidest];
    round_to(query + d, kWidest, rounding.inverse, numbers);
    std::memcpy(query + d / 2, numbers, sizeof numbers);
  }
  query[shape.padded() - 1] = rounding.scale;
}

void turn_queries(const AttentionShape& shape, const float* x, const float* cos, const float* sin, const float* factors,
                  float* queries) {
  for (int64_t g = 0; g < shape.group; ++g, x += shape.dim, queries += shape.padded()) {
    rotate(x, shape.dim, shape.rotary, cos, sin, queries);
    for (int64_t d = 0; d < shape.dim; ++d) queries[d] *= shape.scale;
    if (factors != nullptr)
      for (int64_t d = 0; d < shape.dim; ++d) queries[d] *= factors[d];
    for (int64_t d = shape.dim; d < shape.padded(); ++d) queries[d] = 0.0f;
    if (shape.cache == CacheType::kInt8) round_query(shape, queries);
  }
}

constexpr AttentionKernels kAttention = {store_row, turn_queries, attend, merge, finish};

}  // namespace
}  // namespace glm4
