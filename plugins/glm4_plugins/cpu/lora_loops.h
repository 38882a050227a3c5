// The products of LoRA. Each kernel set includes this file after it has defined:
//   LoraLanes, kLanesOfLora        a vector of floats and its length, at most kLoraLanes
//   LoraLanes exact(a, b, c)       a * b + c, rounded once
//   LoraLanes splat(float)         the number in every lane
//   LoraLanes halves(const uint16_t*)  float16 -> float32, exactly

#include "lora.h"

namespace glm4 {
namespace {

constexpr int kInterleaved = 4;  // sums of one result; they hide the latency of an addition
constexpr int kAhead = 1024;     // elements of A that are fetched before their use

// Adds the products of one input of the rows to one of their interleaved sums.
template <int kM>
inline void add_input(LoraLanes (&sums)[kM][kInterleaved], int i, const float* const* x, int64_t k,
                      const uint16_t* from) {
  const LoraLanes wide = halves(from);
  GLM4_UNROLL
  for (int m = 0; m < kM; ++m) sums[m][i] = exact(splat(x[m][k]), wide, sums[m][i]);
}

template <int kM>
inline void narrow_rows(const float* const* x, const uint16_t* a, int64_t inputs, int64_t rank, float* narrow,
                        int64_t stride) {
  for (int64_t r = 0; r < rank; r += kLanesOfLora) {
    LoraLanes sums[kM][kInterleaved] = {};
    const uint16_t* from = a + r;
    int64_t k = 0;
    for (; k + kInterleaved <= inputs; k += kInterleaved) {
      __builtin_prefetch(from + kAhead);
      GLM4_UNROLL
      for (int i = 0; i < kInterleaved; ++i) add_input<kM>(sums, i, x, k + i, from + i * rank);
      from += kInterleaved * rank;
    }
    GLM4_UNROLL
    for (int i = 0; i < kInterleaved; ++i)
      if (k + i < inputs) add_input<kM>(sums, i, x, k + i, from + i * rank);
    GLM4_UNROLL
    for (int m = 0; m < kM; ++m) {
      const LoraLanes sum = (sums[m][0] + sums[m][1]) + (sums[m][2] + sums[m][3]);
      std::memcpy(narrow + m * stride + r, &sum, sizeof sum);
    }
  }
}

void lora_narrow(const float* const* x, int rows, const uint16_t* a, int64_t inputs, int64_t rank, float* narrow,
                 int64_t stride) {
  switch (rows) {
    case 1: return narrow_rows<1>(x, a, inputs, rank, narrow, stride);
    case 2: return narrow_rows<2>(x, a, inputs, rank, narrow, stride);
    case 3: return narrow_rows<3>(x, a, inputs, rank, narrow, stride);
    default: return narrow_rows<4>(x, a, inputs, rank, narrow, stride);
  }
}

template <int kM>
inline void widen_rows(const float* narrow, int64_t stride, const uint16_t* b, int64_t rank, float* sums) {
  constexpr int kWide = kPanel / kLanesOfLora < 4 ? kPanel / kLanesOfLora : 4;  // vectors of columns at a time
  for (int n = 0; n < kPanel; n += kWide * kLanesOfLora) {
    LoraLanes added[kM][kWide] = {};
    for (int64_t r = 0; r < rank; ++r) {
      __builtin_prefetch(b + (rank + r) * kPanel + n);  // in the next panel
      __builtin_prefetch(b + (rank + r) * kPanel + n + 32);
      GLM4_UNROLL
      for (int v = 0; v < kWide; ++v) {
        const LoraLanes wide = halves(b + r * kPanel + n + v * kLanesOfLora);
        GLM4_UNROLL
        for (int m = 0; m < kM; ++m) added[m][v] = exact(splat(narrow[m * stride + r]), wide, added[m][v]);
      }
    }
    GLM4_UNROLL
    for (int m = 0; m < kM; ++m)
      GLM4_UNROLL
      for (int v = 0; v < kWide; ++v) {
        float* to = sums + m * kPanel + n + v * kLanesOfLora;
        LoraLanes sum;
        std::memcpy(&sum, to, sizeof sum);
        sum += added[m][v];
        std::memcpy(to, &sum, sizeof sum);
      }
  }
}

void lora_widen(const float* narrow, int64_t stride, int rows, const uint16_t* b, int64_t rank, float* sums) {
  switch (rows) {
    case 1: return widen_rows<1>(narrow, stride, b, rank, sums);
    case 2: return widen_rows<2>(narrow, stride, b, rank, sums);
    case 3: return widen_rows<3>(narrow, stride, b, rank, sums);
    default: return widen_rows<4>(narrow, stride, b, rank, sums);
  }
}

constexpr LoraKernels kLora = {lora_narrow, lora_widen};

}  // namespace
}  // namespace glm4
