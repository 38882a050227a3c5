// Kernels for aarch64 processors with products of 8-bit matrices (FEAT_I8MM).
#include "kernels.h"

#include <cmath>
#include <cstring>

#ifdef GLM4_NEON
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("i8mm"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+i8mm")
#endif

#include "loops.h"

#include "lanes_neon.h"
#include "attention_loops.h"
#include "lora_loops.h"
#include "product_loops.h"

namespace glm4 {
namespace {

template <int kBits>
struct Dots {
  static constexpr int kRows = 6, kSums = 24, kInputs = 0;  // registers: 24 sums, 2 of numbers, 3 of x
  static constexpr bool kCentred = false, kPairs = true;

  static uint8x16_t columns(Bytes numbers) { return uint8x16_t(numbers); }
  static int8x16_t inputs(const int8_t* x) { return four_inputs(x); }
  static Ints add(Ints sums, uint8x16_t w, int8x16_t x) { return Ints(vusdotq_s32(int32x4_t(sums), w, x)); }

  // usmmla multiplies eight numbers of two columns with eight numbers of two rows.
  template <int kM, int kV>
  static void sum_pairs(const uint8_t* numbers, const int8_t* x, int block, Ints (&sums)[kM][kV]) {
    int32x4_t squares[kM / 2][kV][2] = {};  // of two columns and two rows: c0 r0, c0 r1, c1 r0, c1 r1
    for (const int8_t* end = x + block; x < end; x += 8, numbers += kBits * kGroup / 4) {
      int8x16_t rows[kM / 2];
      GLM4_UNROLL
      for (int p = 0; p < kM / 2; ++p) rows[p] = vcombine_s8(vld1_s8(x + 2 * p * block), vld1_s8(x + (2 * p + 1) * block));
      GLM4_UNROLL
      for (int v = 0; v < kV; ++v) {
        const uint32x4_t even = uint32x4_t(four_numbers<kBits, 0>(numbers + v * sizeof(Bytes)));
        const uint32x4_t odd = uint32x4_t(four_numbers<kBits, 1>(numbers + v * sizeof(Bytes)));
        const uint8x16_t first = uint8x16_t(vzip1q_u32(even, odd)), last = uint8x16_t(vzip2q_u32(even, odd));
        GLM4_UNROLL
        for (int p = 0; p < kM / 2; ++p) {
          squares[p][v][0] = vusmmlaq_s32(squares[p][v][0], first, rows[p]);
          squares[p][v][1] = vusmmlaq_s32(squares[p][v][1], last, rows[p]);
        }
      }
    }
    GLM4_UNROLL
    for (int p = 0; p < kM / 2; ++p)
      GLM4_UNROLL
      for (int v = 0; v < kV; ++v) {
        sums[2 * p][v] = Ints(vuzp1q_s32(squares[p][v][0], squares[p][v][1]));
        sums[2 * p + 1][v] = Ints(vuzp2q_s32(squares[p][v][0], squares[p][v][1]));
      }
  }
};

}  // namespace

extern const Kernels kNeonI8mmKernels;
const Kernels kNeonI8mmKernels = {"neon-i8mm", round_row, multiply_panel, gate_up, kAttention, kLora};

}  // namespace glm4
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
