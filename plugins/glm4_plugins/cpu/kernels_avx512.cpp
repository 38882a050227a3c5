// Kernels for processors with AVX-512 and its 8-bit dot products (VNNI).
#include "kernels.h"

#include <cmath>
#include <cstring>
#include <type_traits>

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
constexpr int kLanes = 16, kTileRows = 6, kTileVectors = 4;  // registers: 24 sums, 4 of b, 1 of a
inline Lanes fused(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
using LoraLanes = Lanes;
constexpr int kLanesOfLora = kLanes;
inline Lanes exact(Lanes a, Lanes b, Lanes c) { return fused(a, b, c); }
inline Lanes splat(float a) { return _mm512_set1_ps(a); }
inline Lanes halves(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline Lanes widen(const int8_t* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

}  // namespace
}  // namespace glm4

#include "attention_loops.h"
#include "lora_loops.h"

namespace glm4 {
namespace {

constexpr int kVectors = kPanel / 16;  // vectors of 16 columns
constexpr int kUnpacked = 128;         // longest 4-bit block that is unpacked once for several tiles
constexpr int kTile = 6;               // rows of a tile; 24 sums, 4 vectors of weights and 1 of x fit the 32 registers

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

// A block of a panel. The numbers may be unpacked. `at` is the index of the block's first scale.
struct Block {
  const Weights& w;
  const uint8_t* numbers;
  size_t at;
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

template <int kM, int kBits, bool kPlain>
inline void multiply_block(const Block& b, const int8_t* x, const float* x_scales, const int32_t* starts,
                           float* sums) {
  const uint8_t* numbers = b.numbers;
  const int block = b.w.block;
  __m512i dots[kM][kVectors];
  GLM4_UNROLL
  for (int m = 0; m < kM; ++m)
    GLM4_UNROLL
    for (int v = 0; v < kVectors; ++v) dots[m][v] = _mm512_set1_epi32(starts[m]);
  __m512i w[kVectors];
  if (kBits == 8) {
    for (int g = 0; g < block / 4; ++g) {
      GLM4_UNROLL
      for (int v = 0; v < kVectors; ++v) w[v] = _mm512_loadu_si512(numbers + g * 256 + v * 64);
      dot<kM>(dots, w, x + 4 * g, block);
    }
  } else {
    const __m512i low = _mm512_set1_epi8(0x0f);
    for (int g = 0; g < block / 8; ++g) {
      __m512i both[kVectors];
      GLM4_UNROLL
      for (int v = 0; v < kVectors; ++v) both[v] = _mm512_loadu_si512(numbers + g * 256 + v * 64);
      GLM4_UNROLL
      for (int v = 0; v < kVectors; ++v) w[v] = _mm512_and_si512(both[v], low);
      dot<kM>(dots, w, x + 8 * g, block);
      GLM4_UNROLL
      for (int v = 0; v < kVectors; ++v) w[v] = _mm512_and_si512(_mm512_srli_epi16(both[v], 4), low);
      dot<kM>(dots, w, x + 8 * g + 4, block);
    }
  }
  __m512 wide[kVectors];  // loaded only here, because the loop above needs all registers
  GLM4_UNROLL
  for (int v = 0; v < kVectors; ++v) wide[v] = wide_scales<kPlain>(b.w, b.at + v * 16);
  if (!kPlain && b.w.zeros != nullptr) {
    GLM4_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const auto* from = reinterpret_cast<const __m128i*>(b.w.zeros + b.at + v * 16);
      const __m512i zeros = _mm512_cvtepi8_epi32(_mm_loadu_si128(from));
      GLM4_UNROLL
      for (int m = 0; m < kM; ++m) {
        const __m512i sum = _mm512_set1_epi32(-(starts[m] >> (b.w.bits - 1)));  // of the block's numbers of x
        dots[m][v] = _mm512_sub_epi32(dots[m][v], _mm512_mullo_epi32(zeros, sum));
      }
    }
  }
  GLM4_UNROLL
  for (int m = 0; m < kM; ++m) {
    const __m512 x_scale = _mm512_set1_ps(x_scales[m]);
    GLM4_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float* at = sums + m * kPanel + v * 16;
      const __m512 scale = _mm512_mul_ps(x_scale, wide[v]);
      _mm512_storeu_ps(at, _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[m][v]), scale, _mm512_loadu_ps(at)));
    }
  }
}

// Unpacks a block of 4-bit numbers into bytes. Used if several tiles of rows read the block.
void unpack(const uint8_t* numbers, int block, uint8_t* bytes) {
  const __m512i low = _mm512_set1_epi8(0x0f);
  for (int g = 0; g < block / 8; ++g)
    GLM4_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const __m512i both = _mm512_loadu_si512(numbers + g * 256 + v * 64);
      _mm512_storeu_si512(bytes + g * 512 + v * 64, _mm512_and_si512(both, low));
      _mm512_storeu_si512(bytes + g * 512 + 256 + v * 64, _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
    }
}

template <int kBits, bool kPlain>
void multiply(const Weights& w, const Rounded& x, int rows, int64_t panel, float* sums) {
  const int64_t blocks = w.blocks();
  const uint8_t* numbers = w.numbers + size_t(panel * blocks) * w.block_bytes();
  size_t at = size_t(panel * blocks) * kPanel;
  alignas(64) uint8_t bytes[kBits == 4 ? kUnpacked * kPanel : 1];
  for (int64_t b = 0; b < blocks; ++b, numbers += w.block_bytes(), at += kPanel) {
    const int8_t* xs = x.numbers + b * kRows * w.block;
    auto tile = [&](auto bits, auto count, const uint8_t* from, int m) {
      multiply_block<count(), bits(), kPlain>({w, from, at}, xs + m * w.block, x.scales + b * kRows + m,
                                              x.starts + b * kRows + m, sums + m * kPanel);
    };
    auto tiles = [&](auto bits, const uint8_t* from) {
      int m = 0;
      for (; rows - m >= kTile; m += kTile) tile(bits, std::integral_constant<int, kTile>(), from, m);
      switch (rows - m) {
        case 1: tile(bits, std::integral_constant<int, 1>(), from, m); break;
        case 2: tile(bits, std::integral_constant<int, 2>(), from, m); break;
        case 3: tile(bits, std::integral_constant<int, 3>(), from, m); break;
        case 4: tile(bits, std::integral_constant<int, 4>(), from, m); break;
        case 5: tile(bits, std::integral_constant<int, 5>(), from, m); break;
      }
    };
    if (kBits == 8 || rows <= kTile || w.block > kUnpacked) {
      tiles(std::integral_constant<int, kBits>(), numbers);
    } else {
      unpack(numbers, w.block, bytes);
      tiles(std::integral_constant<int, 8>(), bytes);
    }
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
#endif
#endif
