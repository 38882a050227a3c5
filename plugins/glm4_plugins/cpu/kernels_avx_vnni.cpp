// Kernels for processors with AVX2 and its 8-bit dot products (AVX-VNNI), but without AVX-512.
#include "kernels.h"

#include <cmath>
#include <cstring>

#ifdef GLM4_AVX_VNNI
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#else
#pragma GCC push_options
// As in kernels_avx2.cpp.
#pragma GCC optimize("no-tree-pre", "no-tree-reassoc")
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif

#include "loops.h"

#include "lanes_avx2.h"
#include "attention_loops.h"
#include "lora_loops.h"
#include "product_loops.h"

namespace glm4 {
namespace {

// dpbusd multiplies unsigned by signed numbers and adds four products to a sum of 32 bits, without saturation.
template <int kBits>
struct Dots {
  static constexpr int kRows = 6, kSums = 12, kInputs = 0;  // registers: 12 sums, 2 of numbers, 1 of x
  static constexpr bool kCentred = false, kPairs = false;

  static __m256i columns(Bytes numbers) { return reinterpret_cast<__m256i>(numbers); }
  static __m256i inputs(const int8_t* x) { return four_inputs(x); }
  static Ints add(Ints sums, __m256i w, __m256i x) {
    return reinterpret_cast<Ints>(_mm256_dpbusd_avx_epi32(reinterpret_cast<__m256i>(sums), w, x));
  }
};

}  // namespace

extern const Kernels kAvxVnniKernels;
const Kernels kAvxVnniKernels = {"avx-vnni", round_row, multiply_panel, gate_up, kAttention, kLora};

}  // namespace glm4
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
