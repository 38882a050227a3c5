// Kernels for any processor.
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "loops.h"

namespace glm4 {
namespace {

using Lanes = float __attribute__((vector_size(16)));
using Ints = int32_t __attribute__((vector_size(16)));
constexpr int kLanes = 4, kTileRows = 4, kTileVectors = 2;
inline Lanes fused(Lanes a, Lanes b, Lanes c) { return a * b + c; }  // not every processor has FMA
inline Ints fused(Ints a, Ints b, Ints c) { return c + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16); }
using LoraLanes = Lanes;
constexpr int kLanesOfLora = kLanes;
inline Lanes exact(Lanes a, Lanes b, Lanes c) {
  return Lanes{std::fma(a[0], b[0], c[0]), std::fma(a[1], b[1], c[1]), std::fma(a[2], b[2], c[2]),
               std::fma(a[3], b[3], c[3])};
}
inline Lanes splat(float a) { return Lanes{a, a, a, a}; }
inline Lanes halves(const uint16_t* from) {
  return Lanes{float_of_half(from[0]), float_of_half(from[1]), float_of_half(from[2]), float_of_half(from[3])};
}

}  // namespace
}  // namespace glm4

#include "attention_loops.h"
#include "lora_loops.h"

namespace glm4 {
namespace {

void multiply_panel(const Weights& w, const Rounded& x, int rows, int64_t panel, float* sums) {
  const int64_t blocks = w.blocks();
  for (int64_t b = 0; b < blocks; ++b) {
    const uint8_t* numbers = w.numbers + size_t(panel * blocks + b) * w.block_bytes();
    Widened wide;
    widen_block(w, size_t(panel * blocks + b) * kPanel, &wide);
    for (int m = 0; m < rows; ++m) {
      const int64_t place = b * kRows + m;
      const int8_t* in = x.numbers + place * w.block;
      int32_t dots[kPanel];
      const int32_t start = x.starts[place], sum = -(start >> (w.bits - 1));  // of the block's numbers of x
      for (int n = 0; n < kPanel; ++n) dots[n] = start - wide.zeros[n] * sum;
      for (int k = 0; k < w.block; ++k) {
        const int g = k / 4, j = k % 4;
        const uint8_t* four = w.bits == 8 ? numbers + g * 256 : numbers + g / 2 * 256;
        const int shift = w.bits == 8 ? 0 : g % 2 * 4, mask = w.bits == 8 ? 0xff : 0x0f;
        for (int n = 0; n < kPanel; ++n) dots[n] += ((four[n * 4 + j] >> shift) & mask) * in[k];
      }
      float* out = sums + m * kPanel;
      for (int n = 0; n < kPanel; ++n) out[n] = std::fma(float(dots[n]), x.scales[place] * wide.scales[n], out[n]);
    }
  }
}

}  // namespace

extern const Kernels kPortableKernels;
const Kernels kPortableKernels = {"portable", round_row, multiply_panel, gate_up, kAttention, kLora};

}  // namespace glm4
