// Kernels for processors with AVX2. Products are computed from 16-bit numbers and summed in pairs.
#include "kernels.h"

#include <cmath>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
// As in kernels_avx512.cpp: with tree-pre, attention is a third slower.
#pragma GCC optimize("no-tree-pre")
#pragma GCC target("avx2,fma,f16c")
#endif

#include "loops.h"

namespace glm4 {
namespace {

using Lanes = float __attribute__((vector_size(32)));
using Ints = int32_t __attribute__((vector_size(32)));
constexpr int kLanes = 8, kTileRows = 6, kTileVectors = 2;  // registers: 12 sums, 2 of b, 1 of a
inline Lanes fused(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
inline Ints fused(Ints a, Ints b, Ints c) { return c + Ints(_mm256_madd_epi16(__m256i(a), __m256i(b))); }
using LoraLanes = Lanes;
constexpr int kLanesOfLora = kLanes;
inline Lanes exact(Lanes a, Lanes b, Lanes c) { return fused(a, b, c); }
inline Lanes splat(float a) { return _mm256_set1_ps(a); }
inline Lanes halves(const uint16_t* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

}  // namespace
}  // namespace glm4

#include "attention_loops.h"
#include "lora_loops.h"

namespace glm4 {
namespace {

constexpr int kColumns = 32;            // columns at a time; a register holds two sums for each of four columns
constexpr int kVectors = kColumns / 4;  // registers of sums

// Multiplies the next four inputs of 32 columns with those of one row, and adds the products to `pairs`.
inline void dot(__m256i (&pairs)[kVectors], const uint8_t* numbers, int shift, int mask, const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  const __m256i xs = _mm256_cvtepi8_epi16(_mm_set1_epi32(four));
  const __m128i low = _mm_set1_epi8(char(mask));
  for (int v = 0; v < kVectors; ++v) {
    __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(numbers + v * 16));
    bytes = _mm_and_si128(_mm_srl_epi16(bytes, _mm_cvtsi32_si128(shift)), low);
    pairs[v] = _mm256_add_epi32(pairs[v], _mm256_madd_epi16(_mm256_cvtepu8_epi16(bytes), xs));
  }
}

inline __m256 wide_scales(const uint16_t* scales) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

template <bool kPlain>
void multiply(const Weights& w, const Rounded& x, int rows, int64_t panel, float* sums) {
  const int64_t blocks = w.blocks();
  for (int64_t b = 0; b < blocks; ++b) {
    const uint8_t* numbers = w.numbers + size_t(panel * blocks + b) * w.block_bytes();
    const size_t at = size_t(panel * blocks + b) * kPanel;
    const uint16_t* scales = static_cast<const uint16_t*>(w.scales) + at;
    Widened wide;
    if (!kPlain) widen_block(w, at, &wide);
    for (int m = 0; m < rows; ++m) {
      const int64_t place = b * kRows + m;
      const int8_t* in = x.numbers + place * w.block;
      const __m256 x_scale = _mm256_set1_ps(x.scales[place]);
      for (int n = 0; n < kPanel; n += kColumns) {
        __m256i pairs[kVectors];
        for (int v = 0; v < kVectors; ++v) pairs[v] = _mm256_setzero_si256();
        if (w.bits == 8) {
          for (int g = 0; g < w.block / 4; ++g) dot(pairs, numbers + g * 256 + n * 4, 0, 0xff, in + 4 * g);
        } else {
          for (int g = 0; g < w.block / 8; ++g) {
            dot(pairs, numbers + g * 256 + n * 4, 0, 0x0f, in + 8 * g);
            dot(pairs, numbers + g * 256 + n * 4, 4, 0x0f, in + 8 * g + 4);
          }
        }
        const __m256i start = _mm256_set1_epi32(x.starts[place]);
        const __m256i sum = _mm256_set1_epi32(-(x.starts[place] >> (w.bits - 1)));  // of the block's numbers of x
        for (int v = 0; v < kVectors; v += 2) {
          // Adds each pair, for eight columns. hadd interleaves its operands; the permutation restores the order.
          const __m256i mixed = _mm256_hadd_epi32(pairs[v], pairs[v + 1]);
          __m256i dots = _mm256_add_epi32(_mm256_permute4x64_epi64(mixed, 0xd8), start);
          const int column = n + v * 4;
          if (!kPlain) {
            const __m256i zeros = _mm256_load_si256(reinterpret_cast<const __m256i*>(wide.zeros + column));
            dots = _mm256_sub_epi32(dots, _mm256_mullo_epi32(zeros, sum));
          }
          float* to = sums + m * kPanel + column;
          const __m256 w_scale = kPlain ? wide_scales(scales + column) : _mm256_load_ps(wide.scales + column);
          const __m256 scale = _mm256_mul_ps(x_scale, w_scale);
          _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots), scale, _mm256_loadu_ps(to)));
        }
      }
    }
  }
}

void multiply_panel(const Weights& w, const Rounded& x, int rows, int64_t panel, float* sums) {
  (w.plain() ? multiply<true> : multiply<false>)(w, x, rows, panel, sums);
}

}  // namespace

extern const Kernels kAvx2Kernels;
const Kernels kAvx2Kernels = {"avx2", round_row, multiply_panel, gate_up, kAttention, kLora};

}  // namespace glm4
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
