// Kernels for processors with AVX2. Their 8-bit products are summed in pairs of 16 bits, which must not overflow.
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
#pragma GCC optimize("no-tree-pre", "no-tree-reassoc")
#pragma GCC target("avx2,fma,f16c")
#endif

#include "loops.h"

#include "lanes_avx2.h"
#include "attention_loops.h"
#include "lora_loops.h"
#include "product_loops.h"

namespace glm4 {
namespace {

inline __m256i plain(Ints a) { return reinterpret_cast<__m256i>(a); }
inline Ints add_pairs(__m256i pairs) {  // of 16-bit numbers
  return reinterpret_cast<Ints>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// maddubs multiplies an unsigned by a signed number and adds two products in 16 bits. It saturates for two products of
// 255 * 127. Products of |number - 128| <= 128 and +-x, |x| <= 127, fit: 2 * 128 * 127 < 2^15.
template <>
struct Dots<8> {
  struct Columns {
    __m256i sizes, signs;
  };
  static constexpr int kRows = 8, kSums = 8, kInputs = 0;
  static constexpr bool kCentred = true, kPairs = false;

  static Columns columns(Bytes numbers) {
    const __m256i centred = reinterpret_cast<__m256i>(numbers ^ uint8_t(0x80));
    return {_mm256_abs_epi8(centred), centred};
  }
  static __m256i inputs(const int8_t* x) { return four_inputs(x); }
  static Ints add(Ints sums, Columns w, __m256i x) {
    return sums + add_pairs(_mm256_maddubs_epi16(w.sizes, _mm256_sign_epi8(x, w.signs)));
  }
};

// 16 products of 15 * 127 fit 16 bits: eight groups of four inputs, since maddubs adds two.
template <>
struct Dots<4> {
  using Columns = __m256i;
  static constexpr int kRows = 6, kSums = 12, kInputs = 32;
  static constexpr bool kCentred = false, kPairs = false;

  static Columns columns(Bytes numbers) { return reinterpret_cast<__m256i>(numbers); }
  static __m256i inputs(const int8_t* x) { return four_inputs(x); }
  static Ints add(Ints sums, Columns w, __m256i x) {
    return reinterpret_cast<Ints>(_mm256_add_epi16(plain(sums), _mm256_maddubs_epi16(w, x)));
  }
  static Ints total(Ints sums) { return add_pairs(plain(sums)); }
};

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
