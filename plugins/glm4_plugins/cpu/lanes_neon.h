// Registers of four floats, for the kernel sets of aarch64. The including file names the instruction set first.

#include <arm_neon.h>

#include <cstring>

namespace glm4 {
namespace {

using Lanes = float __attribute__((vector_size(16)));
using Ints = int32_t __attribute__((vector_size(16)));
constexpr int kLanes = 4, kTileRows = 6, kTileVectors = 4;  // registers: 24 sums, 4 of b, 1 of a
inline Lanes fused(Lanes a, Lanes b, Lanes c) {
  return Lanes(vfmaq_f32(float32x4_t(c), float32x4_t(a), float32x4_t(b)));
}
inline Ints fused(Ints a, Ints b, Ints c) {
  const int16x8_t x = int16x8_t(a), y = int16x8_t(b);
  const int32x4_t low = vmull_s16(vget_low_s16(x), vget_low_s16(y)), high = vmull_high_s16(x, y);
  return c + Ints(vpaddq_s32(low, high));
}
using LoraLanes = Lanes;
constexpr int kLanesOfLora = kLanes;
inline Lanes exact(Lanes a, Lanes b, Lanes c) { return fused(a, b, c); }
inline Lanes splat(float a) { return Lanes(vdupq_n_f32(a)); }
inline Lanes halves(const uint16_t* from) { return Lanes(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)))); }

// Four int8 numbers of a row of x, for each of four columns.
inline int8x16_t four_inputs(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

}  // namespace
}  // namespace glm4
