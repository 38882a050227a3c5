// Registers of eight floats, for the kernel sets with AVX2. The including file names the instruction set first.

#include <immintrin.h>

#include <cstring>

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

// Four int8 numbers of a row of x, for each of eight columns.
inline __m256i four_inputs(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

}  // namespace
}  // namespace glm4
