// Kernels for aarch64 processors with dot products of signed 8-bit numbers (FEAT_DotProd).
#include "kernels.h"

#include <cmath>
#include <cstring>

#ifdef GLM4_NEON
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#include "loops.h"

#include "lanes_neon.h"
#include "attention_loops.h"
#include "lora_loops.h"
#include "product_loops.h"

namespace glm4 {
namespace {

// sdot multiplies signed numbers: those of 8 bits are moved by 128.
template <int kBits>
struct Dots {
  static constexpr int kRows = 6, kSums = 24, kInputs = 0;  // registers: 24 sums, 4 of numbers, 1 of x
  static constexpr bool kCentred = kBits == 8, kPairs = false;

  static int8x16_t columns(Bytes numbers) { return int8x16_t(kCentred ? numbers ^ uint8_t(0x80) : numbers); }
  static int8x16_t inputs(const int8_t* x) { return four_inputs(x); }
  static Ints add(Ints sums, int8x16_t w, int8x16_t x) { return Ints(vdotq_s32(int32x4_t(sums), w, x)); }
};

}  // namespace

extern const Kernels kNeonDotprodKernels;
const Kernels kNeonDotprodKernels = {"neon-dotprod", round_row, multiply_panel, gate_up, kAttention, kLora};

}  // namespace glm4
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
