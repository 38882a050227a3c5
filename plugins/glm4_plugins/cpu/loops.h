// Functions that the compiler vectorizes well. Each kernel set includes this file, compiled for its instruction set.

#include <cmath>
#include <cstring>

#include "product.h"

namespace glm4 {
namespace {

constexpr float kSmallest = 1e-30f;  // a smaller block is rounded to zero; 127 / kSmallest is finite

void round_row(const Weights& w, const float* x, const Rounded& to, int row) {
  for (int64_t b = 0; b < w.blocks(); ++b) {
    const int64_t first = b * w.block;
    const int count = int(w.width - first < w.block ? w.width - first : w.block);
    const float* in = x + first;
    int8_t* out = to.numbers + (b * kRows + row) * w.block;
    int32_t most = 0;  // magnitudes of floats order like their bits as integers, which compilers vectorize
    for (int i = 0; i < count; ++i) {
      int32_t bits;
      std::memcpy(&bits, in + i, sizeof bits);
      bits &= 0x7fffffff;
      most = bits > most ? bits : most;
    }
    float largest;
    std::memcpy(&largest, &most, sizeof largest);
    if (!std::isfinite(largest)) {  // the scale NaN makes the result NaN
      std::memset(out, 0, size_t(w.block));
      to.scales[b * kRows + row] = NAN;
      to.starts[b * kRows + row] = 0;
      continue;
    }
    const float inverse = largest > kSmallest ? 127.0f / largest : 0.0f;
    int32_t sum = 0;
    for (int i = 0; i < count; ++i) {
      // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, ties to even.
      const int32_t number = int32_t(in[i] * inverse + 12582912.0f - 12582912.0f);
      out[i] = int8_t(number);
      sum += number;
    }
    if (count < w.block) std::memset(out + count, 0, w.block - count);
    to.scales[b * kRows + row] = largest / 127.0f;
    to.starts[b * kRows + row] = -w.zero() * sum;
  }
}

// Scales and zero points of one block of a panel, as the sums need them.
struct Widened {
  alignas(64) float scales[kPanel];
  alignas(64) int32_t zeros[kPanel];
};

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// float16 -> float32, exactly, without arithmetic on subnormal numbers, which a session may flush to zero.
inline float float_of_half(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
  const uint32_t normal = (rest << 13) + (rest >= 0x7c00 ? 224u << 23 : 112u << 23);
  const uint32_t small = bits_of(float(int32_t(rest)) * 5.9604644775390625e-8f);  // 2^-24
  return float_of((rest < 0x0400 ? small : normal) | sign);
}

// float32 -> float16, to nearest, ties to even. A number beyond the range becomes the largest, 65504.
inline uint16_t half_of_float(float value) {
  const uint32_t bits = bits_of(value), rest = bits & 0x7fffffff;
  const uint32_t small = bits_of(float_of(rest) + 0.5f) - 0x3f000000;  // in steps of 2^-24, as 0.5 + 2^-24 n
  const uint32_t normal = (rest - (112u << 23) + 0x0fff + (rest >> 13 & 1)) >> 13;
  const uint32_t large = rest > 0x7f800000 ? 0x7e00 : 0x7bff;  // NaN, or saturated
  const uint32_t half = rest < 0x38800000 ? small : rest < 0x477ff000 ? normal : large;
  return uint16_t(half | (bits >> 16 & 0x8000));
}

// float32 -> bfloat16, to nearest, ties to even.
inline uint16_t bfloat_of_float(float value) {
  const uint32_t bits = bits_of(value), nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x0040 : nearest);
}

// `at`: index of the block's first column among all scales.
inline void widen_block(const Weights& w, size_t at, Widened* to) {
  const auto* halves = static_cast<const uint16_t*>(w.scales) + at;
  switch (w.scale_type) {
    case ScaleType::kBfloat16:
      for (int n = 0; n < kPanel; ++n) to->scales[n] = float_of(uint32_t(halves[n]) << 16);
      break;
    case ScaleType::kFloat16:
      for (int n = 0; n < kPanel; ++n) to->scales[n] = float_of_half(halves[n]);
      break;
    case ScaleType::kFloat32:
      std::memcpy(to->scales, static_cast<const float*>(w.scales) + at, sizeof to->scales);
  }
  if (w.zeros == nullptr)
    std::memset(to->zeros, 0, sizeof to->zeros);
  else
    for (int n = 0; n < kPanel; ++n) to->zeros[n] = w.zeros[at + n];
}

inline float exponential(float x) {
  // e^x = 2^n e^r, where n is the integer nearest to x / ln 2. e^r is a Taylor polynomial on |r| <= ln 2 / 2.
  x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float n = x * 1.44269504f + 12582912.0f - 12582912.0f;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

void gate_up(float* gate, const float* up, int count) {
  for (int i = 0; i < count; ++i) gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

}  // namespace
}  // namespace glm4
