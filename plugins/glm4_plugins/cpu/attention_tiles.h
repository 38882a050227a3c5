// Products of small tiles, and the transposition of registers. attention_loops.h says what the including file defines.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define GLM4_UNROLL _Pragma("GCC unroll 8")  // keeps the sums of a tile in registers
#define GLM4_UNROLL_LANES _Pragma("GCC unroll 16")

namespace glm4 {
namespace {

template <typename T>
using VectorOf = std::conditional_t<std::is_same_v<T, float>, Lanes, Ints>;

template <typename T>
inline VectorOf<T> load(const T* from) {
  VectorOf<T> lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

template <typename T>
inline void store(T* to, VectorOf<T> lanes) {
  std::memcpy(to, &lanes, sizeof lanes);
}

// c [kM][kV vectors] = a [kM][depth] b [depth][kV vectors]. Each element is summed in order of depth. T is float, or
// int32_t: then an element of a and of b is a pair of int16 numbers.
template <int kM, int kV, typename T>
inline void multiply_tile(const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, int depth) {
  using Registers = VectorOf<T>;
  Registers sums[kM][kV];
  GLM4_UNROLL
  for (int m = 0; m < kM; ++m)
    GLM4_UNROLL
    for (int v = 0; v < kV; ++v) sums[m][v] = Registers{};
  for (int k = 0; k < depth; ++k, b += ldb) {
    Registers row[kV];
    GLM4_UNROLL
    for (int v = 0; v < kV; ++v) row[v] = load(b + v * kLanes);
    GLM4_UNROLL
    for (int m = 0; m < kM; ++m) {
      const Registers one = Registers{} + a[m * lda + k];
      GLM4_UNROLL
      for (int v = 0; v < kV; ++v) sums[m][v] = fused(one, row[v], sums[m][v]);
    }
  }
  GLM4_UNROLL
  for (int m = 0; m < kM; ++m)
    GLM4_UNROLL
    for (int v = 0; v < kV; ++v) store(c + m * ldc + v * kLanes, sums[m][v]);
}

template <int kM, typename T>
inline void multiply_rows(const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, int vectors, int depth) {
  int v = 0;
  for (; v + kTileVectors <= vectors; v += kTileVectors)
    multiply_tile<kM, kTileVectors>(a, lda, b + v * kLanes, ldb, c + v * kLanes, ldc, depth);
  for (; v < vectors; ++v) multiply_tile<kM, 1>(a, lda, b + v * kLanes, ldb, c + v * kLanes, ldc, depth);
}

template <int kM, typename T>
inline void multiply_rest(int rows, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, int vectors,
                          int depth) {
  if (rows == kM) multiply_rows<kM>(a, lda, b, ldb, c, ldc, vectors, depth);
  if constexpr (kM > 1) {
    if (rows < kM) multiply_rest<kM - 1>(rows, a, lda, b, ldb, c, ldc, vectors, depth);
  }
}

template <typename T>
void multiply(int rows, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, int vectors, int depth) {
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

}  // namespace
}  // namespace glm4
