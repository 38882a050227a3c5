// The attention kernels for registers of kLanes floats. The including file must include loops.h first, and define:
// `Lanes` (a vector type), `kLanes`, `kTileRows` and `kTileVectors` (a tile of sums that fits the registers),
// `fused` (a * b + c), and `widen` (kLanes int8 numbers to float).

#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "attention.h"

#define GLM4_UNROLL _Pragma("GCC unroll 8")  // keeps the sums of a tile in registers
#define GLM4_UNROLL_LANES _Pragma("GCC unroll 16")

namespace glm4 {
namespace {

inline Lanes load(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

inline void store(float* to, Lanes lanes) { std::memcpy(to, &lanes, sizeof lanes); }

// c [kM][kV vectors] = a [kM][depth] b [depth][kV vectors]. Each element is summed in order of depth.
template <int kM, int kV>
inline void multiply_tile(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int depth) {
  Lanes sums[kM][kV];
  GLM4_UNROLL
  for (int m = 0; m < kM; ++m)
    GLM4_UNROLL
    for (int v = 0; v < kV; ++v) sums[m][v] = Lanes{};
  for (int k = 0; k < depth; ++k, b += ldb) {
    Lanes row[kV];
    GLM4_UNROLL
    for (int v = 0; v < kV; ++v) row[v] = load(b + v * kLanes);
    GLM4_UNROLL
    for (int m = 0; m < kM; ++m) {
      const Lanes one = Lanes{} + a[m * lda + k];
      GLM4_UNROLL
      for (int v = 0; v < kV; ++v) sums[m][v] = fused(one, row[v], sums[m][v]);
    }
  }
  GLM4_UNROLL
  for (int m = 0; m < kM; ++m)
    GLM4_UNROLL
    for (int v = 0; v < kV; ++v) store(c + m * ldc + v * kLanes, sums[m][v]);
}

template <int kM>
inline void multiply_rows(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int vectors,
                          int depth) {
  int v = 0;
  for (; v + kTileVectors <= vectors; v += kTileVectors)
    multiply_tile<kM, kTileVectors>(a, lda, b + v * kLanes, ldb, c + v * kLanes, ldc, depth);
  for (; v < vectors; ++v) multiply_tile<kM, 1>(a, lda, b + v * kLanes, ldb, c + v * kLanes, ldc, depth);
}

template <int kM>
inline void multiply_rest(int rows, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                          int vectors, int depth) {
  if (rows == kM) multiply_rows<kM>(a, lda, b, ldb, c, ldc, vectors, depth);
  if constexpr (kM > 1) {
    if (rows < kM) multiply_rest<kM - 1>(rows, a, lda, b, ldb, c, ldc, vectors, depth);
  }
}

void multiply(int rows, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int vectors,
              int depth) {
  for (; rows > 0; rows -= kTileRows, a += kTileRows * lda, c += kTileRows * ldc)
    multiply_rest<kTileRows>(rows < kTileRows ? rows : kTileRows, a, lda, b, ldb, c, ldc, vectors, depth);
}

// The next three functions transpose kLanes vectors in place, by swaps of off-diagonal blocks of 1, 2, 4 ... elements.
template <int... kFrom>
inline Lanes pick(Lanes first, Lanes second) {
#ifdef __clang__
  return __builtin_shufflevector(first, second, kFrom...);
#else
  using Places = int32_t __attribute__((vector_size(sizeof(Lanes))));
  return __builtin_shuffle(first, second, Places{kFrom...});
#endif
}

template <int kStep, int... kLane>
inline void exchange(Lanes& upper, Lanes& lower, std::integer_sequence<int, kLane...>) {
  const Lanes first = pick<(kLane & kStep ? kLane - kStep + kLanes : kLane)...>(upper, lower);
  lower = pick<(kLane & kStep ? kLane + kLanes : kLane + kStep)...>(upper, lower);
  upper = first;
}

template <int kStep = 1>
inline void turn(Lanes (&rows)[kLanes]) {
  GLM4_UNROLL_LANES
  for (int i = 0; i < kLanes; ++i)
    if (!(i & kStep)) exchange<kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, kLanes>());
  if constexpr (2 * kStep < kLanes) turn<2 * kStep>(rows);
}

inline Lanes widen(const float* from) { return load(from); }

// Loads `count` numbers as floats, padded with zeros.
template <typename T>
inline Lanes widen(const T* from, int count) {
  if (count >= kLanes) return widen(from);
  T whole[kLanes] = {};
  std::memcpy(whole, from, size_t(count) * sizeof(T));
  return widen(whole);
}

// Transposes `count` keys [count][dim] into columns [dim][kKeys], padded with zeros to whole registers.
template <typename T>
void turn_keys(const T* keys, int count, int dim, float* columns) {
  for (int j = 0; j < count; j += kLanes)
    for (int d = 0; d < dim; d += kLanes) {
      Lanes rows[kLanes];
      for (int i = 0; i < kLanes; ++i)
        rows[i] = j + i < count ? widen(keys + int64_t(j + i) * dim + d, dim - d) : Lanes{};
      turn(rows);
      for (int i = 0; i < kLanes && d + i < dim; ++i) store(columns + (d + i) * kKeys + j, rows[i]);
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

template <typename T>
void attend_to(const AttentionShape& shape, const Attended& some, const AttentionScratch& scratch, const Partial& to) {
  const int dim = int(shape.dim);
  const int64_t padded = shape.padded();
  const T* keys = static_cast<const T*>(some.keys);
  for (int j = 0; j < some.count; j += kKeys) {
    const int count = some.count - j < kKeys ? some.count - j : kKeys;
    turn_keys(keys + int64_t(j) * dim, count, dim, scratch.columns);
    multiply(some.rows, some.queries, padded, scratch.columns, kKeys, scratch.scores + j, kChunk,
             (count + kLanes - 1) / kLanes, dim);
  }
  const int all = (some.count + kWidest - 1) / kWidest * kWidest;
  for (int r = 0; r < some.rows; ++r) {
    const int seen = some.first + r / some.group;
    weigh(scratch.scores + r * kChunk, seen < some.count ? (seen > 0 ? seen : 0) : some.count, all, to.most + r,
          to.total + r);
  }
  const float* values = static_cast<const float*>(some.values);
  if (!std::is_same<T, float>::value || padded != dim) {
    widen_values(static_cast<const T*>(some.values), some.count, dim, padded, scratch.values);
    values = scratch.values;
  }
  multiply(some.rows, scratch.scores, kChunk, values, padded, to.sums, padded, int(padded) / kLanes, some.count);
}

void attend(const AttentionShape& shape, const Attended& some, const AttentionScratch& scratch, const Partial& to) {
  (shape.quantized ? attend_to<int8_t> : attend_to<float>)(shape, some, scratch, to);
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

void finish(const AttentionShape& shape, const Partial& partial, int row, const float* value_scales, float* output) {
  for (int64_t g = 0; g < shape.group; ++g, ++row, output += shape.dim) {
    const float* sums = partial.sums + row * shape.padded();
    const float total = partial.total[row];
    for (int64_t d = 0; d < shape.dim; ++d) output[d] = sums[d] / total;
    if (value_scales != nullptr)
      for (int64_t d = 0; d < shape.dim; ++d) output[d] *= value_scales[d];
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

void store_row(const AttentionShape& shape, const float* x, const float* cos, const float* sin, const float* scales,
               void* row) {
  if (scales == nullptr) {
    rotate(x, shape.dim, cos == nullptr ? 0 : shape.rotary, cos, sin, static_cast<float*>(row));
    return;
  }
  int8_t* stored = static_cast<int8_t*>(row);
  const int64_t rotated = cos == nullptr ? 0 : shape.rotary;
  for (int64_t d = 0; d < shape.dim; ++d) {
    const int64_t i = d / 2;
    float value = x[d];
    if (d < rotated) value = d % 2 ? x[d - 1] * sin[i] + x[d] * cos[i] : x[d] * cos[i] - x[d + 1] * sin[i];
    value /= scales[d];
    value = value > -128.0f ? value < 127.0f ? value : 127.0f : -128.0f;  // NaN becomes -128
    stored[d] = int8_t(value + 12582912.0f - 12582912.0f);  // rounds to nearest, ties to even
  }
}

void turn_queries(const AttentionShape& shape, const float* x, const float* cos, const float* sin,
                  const float* key_scales, float* queries) {
  for (int64_t g = 0; g < shape.group; ++g, x += shape.dim, queries += shape.padded()) {
    rotate(x, shape.dim, shape.rotary, cos, sin, queries);
    for (int64_t d = 0; d < shape.dim; ++d) queries[d] *= shape.scale;
    if (key_scales != nullptr)
      for (int64_t d = 0; d < shape.dim; ++d) queries[d] *= key_scales[d];
    for (int64_t d = shape.dim; d < shape.padded(); ++d) queries[d] = 0.0f;
  }
}

constexpr AttentionKernels kAttention = {store_row, turn_queries, attend, merge, finish};

}  // namespace
}  // namespace glm4
