// Kernels for processors with AVX-512 and its 8-bit dot products (VNNI).
#include "kernels.h"

#include <cmath>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma"))), apply_to = function)
#else
#pragma GCC push_options
// With tree-pre, GCC 12 keeps copies of a tile's sums across the loop and spills them to memory.
#pragma GCC optimize("no-tree-pre")
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")
#endif

#include "loops.h"

namespace glm4 {
namespace {

using Lanes = float __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));
constexpr int kLanes = 16, kTileRows = 6, kTileVectors = 4;  // registers: 24 sums, 4 of b, 1 of a
inline Lanes fused(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
inline Ints fused(Ints a, Ints b, Ints c) { return Ints(_mm512_dpwssd_epi32(__m512i(c), __m512i(a), __m512i(b))); }
using LoraLanes = Lanes;
constexpr int kLanesOfLora = kLanes;
inline Lanes exact(Lanes a, Lanes b, Lanes c) { return fused(a, b, c); }
inline Lanes splat(float a) { return _mm512_set1_ps(a); }
inline Lanes halves(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

}  // namespace
}  // namespace glm4

#include "attention_loops.h"
#include "lora_loops.h"

#ifndef __clang__
#pragma GCC push_options
// With loop invariants moved, GCC 12 copies sums of a 4-bit tile in its inner loop, and prompts are a tenth slower.
#pragma GCC optimize("no-move-loop-invariants")
#endif

namespace glm4 {
namespace {

constexpr int kVectors = kPanel / 16;  // vectors of 16 columns
constexpr int kTile = 6;               // rows of a tile; 24 sums, 4 vectors of weights and 1 of x fit the 32 registers
constexpr int kLine = 64;              // bytes of a cache line
constexpr int kFetchedAhead = 12288;   // bytes of weights between a fetch and its use

template <int kM>
inline void dot(__m512i (&sums)[kM][kVectors], const __m512i* w, const int8_t* x, int stride) {
  GLM4_UNROLL
  for (int m = 0; m < kM; ++m) {
    int32_t four;
    std::memcpy(&four, x + m * stride, 4);
    const __m512i xs = _mm512_set1_epi32(four);
    GLM4_UNROLL
    for (int v = 0; v < kVectors; ++v) sums[m][v] = _mm512_dpbusd_epi32(sums[m][v], w[v], xs);
  }
}

// A block of a panel. `at` is the index of the block's first scale. `ahead` is what a tile fetches while it multiplies.
struct Block {
  const Weights& w;
  const uint8_t* numbers;
  size_t at;
  const uint8_t* ahead;
};

// Sixteen scales of a matrix. With kPlain they are bfloat16.
template <bool kPlain>
inline __m512 wide_scales(const Weights& w, size_t at) {
  if (!kPlain && w.scale_type == ScaleType::kFloat32)
    return _mm512_loadu_ps(static_cast<const float*>(w.scales) + at);
  const auto* from = static_cast<const uint16_t*>(w.scales) + at;
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  if (!kPlain && w.scale_type == ScaleType::kFloat16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// The next 256 numbers: bytes, or the halves of bytes that begin at bit kShift.
template <int kBits, int kShift>
inline void read_numbers(const uint8_t* from, __m512i (&w)[kVectors]) {
  GLM4_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    w[v] = _mm512_loadu_si512(from + v * 64);
    if (kShift > 0) w[v] = _mm512_srli_epi16(w[v], kShift);
    if (kBits == 4) w[v] = _mm512_and_si512(w[v], _mm512_set1_epi8(0x0f));
  }
}

// Adds the products of 256 bytes of a block: of the next four inputs, or with 4 bits of the next eight.
template <int kBits, int kM>
inline void dot_step(__m512i (&sums)[kM][kVectors], const uint8_t* numbers, const int8_t* x, int stride) {
  __m512i w[kVectors];
  read_numbers<kBits, 0>(numbers, w);
  dot<kM>(sums, w, x, stride);
  if (kBits == 8) return;
  read_numbers<kBits, 4>(numbers, w);  // read again, because registers are few
  dot<kM>(sums, w, x + 4, stride);
}

// The block's sum with its zero points subtracted. `start` is the row's.
inline __m512i without_zeros(__m512i sum, const Weights& w, size_t at, int32_t start) {
  const __m512i zeros = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.zeros + at)));
  const __m512i of_x = _mm512_set1_epi32(-(start >> (w.bits - 1)));  // the sum of the block's numbers of x
  return _mm512_sub_epi32(sum, _mm512_mullo_epi32(zeros, of_x));
}

inline void fetch(const uint8_t* from, int bytes) {
  for (int i = 0; i < bytes; i += kLine) _mm_prefetch(reinterpret_cast<const char*>(from) + i, _MM_HINT_T0);
}

// Each 256 bytes of weights, the tile fetches kLines lines. The starts are added last: if the sums began with them,
// 4-bit products would be a tenth slower.
template <int kM, int kBits, bool kPlain, int kLines>
void multiply_tile(const Block& b, const int8_t* x, const float* x_scales, const int32_t* starts, float* sums) {
  constexpr int kInputs = kBits == 8 ? 4 : 8;
  __m512i dots[kM][kVectors];
  GLM4_UNROLL
  for (int m = 0; m < kM; ++m)
    GLM4_UNROLL
    for (int v = 0; v < kVectors; ++v) dots[m][v] = _mm512_setzero_si512();
  for (int g = 0; g < b.w.block / kInputs; ++g) {
    fetch(b.ahead + g * kLines * kLine, kLines * kLine);
    dot_step<kBits>(dots, b.numbers + g * 256, x + kInputs * g, b.w.block);
  }
  __m512 wide[kVectors];  // loaded only here, because the loop above needs all registers
  GLM4_UNROLL
  for (int v = 0; v < kVectors; ++v) wide[v] = wide_scales<kPlain>(b.w, b.at + v * 16);
  GLM4_UNROLL
  for (int m = 0; m < kM; ++m) {
    const __m512i start = _mm512_set1_epi32(starts[m]);
    const __m512 x_scale = _mm512_set1_ps(x_scales[m]);
    GLM4_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      __m512i sum = _mm512_add_epi32(dots[m][v], start);
      if (!kPlain && b.w.zeros != nullptr) sum = without_zeros(sum, b.w, b.at + v * 16, starts[m]);
      float* at = sums + m * kPanel + v * 16;
      const __m512 scale = _mm512_mul_ps(x_scale, wide[v]);
      _mm512_storeu_ps(at, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, _mm512_loadu_ps(at)));
    }
  }
}

using MultiplyTile = void (*)(const Block&, const int8_t* x, const float* x_scales, const int32_t* starts, float* sums);

// By the number of rows.
template <int kBits, bool kPlain, int kLines>
constexpr MultiplyTile kTiles[kTile + 1] = {nullptr,
                                            multiply_tile<1, kBits, kPlain, kLines>,
                                            multiply_tile<2, kBits, kPlain, kLines>,
                                            multiply_tile<3, kBits, kPlain, kLines>,
                                            multiply_tile<4, kBits, kPlain, kLines>,
                                            multiply_tile<5, kBits, kPlain, kLines>,
                                            multiply_tile<6, kBits, kPlain, kLines>};

// Rows are divided evenly among tiles, and the tiles fetch what later blocks read. Without the fetches, the first tile
// of a block waits for memory, and memory waits for the other tiles. With 8 bits, the fetches are spread over the first
// tiles: two lines each 256 bytes if there are two or three tiles, one line if there are more. A single tile reads
// memory without a pause; there, fetches only cost time. With 4 bits, blocks are short, and each tile starts with its
// share of the fetches.
template <int kBits, bool kPlain>
void multiply(const Weights& w, const Rounded& x, int rows, int64_t panel, float* sums) {
  const int64_t blocks = w.blocks();
  const int bytes = int(w.block_bytes()), tiles = (rows + kTile - 1) / kTile;
  const int fetching = kBits == 4 ? tiles : tiles == 1 ? 0 : tiles < 4 ? 2 : 4;
  const int share = fetching == 0 ? 0 : (bytes / kLine + fetching - 1) / fetching * kLine;
  const MultiplyTile* first = kBits == 4 ? kTiles<4, kPlain, 0> : tiles < 4 ? kTiles<8, kPlain, 2> : kTiles<8, kPlain, 1>;
  const uint8_t* numbers = w.numbers + size_t(panel * blocks) * w.block_bytes();
  size_t at = size_t(panel * blocks) * kPanel;
  for (int64_t b = 0; b < blocks; ++b, numbers += bytes, at += kPanel)
    for (int t = 0, m = 0; t < tiles; ++t) {
      const int count = rows / tiles + (t < rows % tiles);
      const int64_t place = b * kRows + m;
      const int8_t* xs = x.numbers + place * w.block;
      const uint8_t* ahead = numbers + kFetchedAhead + t * share;
      if (kBits == 4) fetch(ahead, share);
      if (tiles > 1) fetch(reinterpret_cast<const uint8_t*>(xs) + kRows * w.block, count * w.block);
      const MultiplyTile* multiply_rows = t < fetching ? first : kTiles<kBits, kPlain, 0>;
      multiply_rows[count]({w, numbers, at, ahead}, xs, x.scales + place, x.starts + place, sums + m * kPanel);
      m += count;
    }
}

void multiply_panel(const Weights& w, const Rounded& x, int rows, int64_t panel, float* sums) {
  if (w.plain())
    (w.bits == 8 ? multiply<8, true> : multiply<4, true>)(w, x, rows, panel, sums);
  else
    (w.bits == 8 ? multiply<8, false> : multiply<4, false>)(w, x, rows, panel, sums);
}

}  // namespace

extern const Kernels kAvx512Kernels;
const Kernels kAvx512Kernels = {"avx512-vnni", round_row, multiply_panel, gate_up, kAttention, kLora};

}  // namespace glm4
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#pragma GCC pop_options
#endif
#endif
