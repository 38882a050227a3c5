// Products per second of the kernels of target cpu, on one thread, beside the peak of the processor's instruction.
//
//   cd plugins/glm4_plugins/cpu
//   g++ -std=c++17 -O3 -fno-math-errno -ffp-contract=off -I. ../../../benchmarks/product_rate.cpp kernels*.cpp \
//     attention.cpp -o /tmp/product_rate
//   /tmp/product_rate [KERNELS]
//
// A panel in the cache shows what a core computes. Panels in memory, each read once, show a step. The rate is that of
// the fastest of many runs, because other processes only slow a run down.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "kernels.h"

using namespace glm4;

namespace {

constexpr int kWidth = 4096;
constexpr int64_t kManyPanels = 600;  // 150 MB of 8-bit weights, more than the caches
constexpr int kAtOnce = 40;           // panels of one run

double seconds(const std::chrono::steady_clock::time_point& start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

#if defined(__x86_64__)
#define DOT(n) "vpdpbusd %%zmm30, %%zmm31, %%zmm" #n "\n\t"
#define DOTS(a, b, c, d, e, f) DOT(a) DOT(b) DOT(c) DOT(d) DOT(e) DOT(f)

// Products per second of 24 independent sums in registers.
double peak() {
  constexpr int kTimes = 100000;
  double best = 1e9;
  for (int run = 0; run < 20; ++run) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < kTimes; ++i)
      asm volatile(DOTS(0, 1, 2, 3, 4, 5) DOTS(6, 7, 8, 9, 10, 11) DOTS(12, 13, 14, 15, 16, 17)
                       DOTS(18, 19, 20, 21, 22, 23)::: "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",
                   "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
    best = std::min(best, seconds(start));
  }
  return 64.0 * 24 * kTimes / best;
}
#endif

struct Case {
  int bits, block;
};

struct Matrix {
  std::vector<uint8_t> numbers;
  std::vector<uint16_t> scales;
  Weights w;

  Matrix(Case c, int64_t panels, std::mt19937* random) {
    w = {nullptr, nullptr, ScaleType::kBfloat16, nullptr, nullptr, panels * kPanel, kWidth, c.bits, c.block};
    numbers.resize(size_t(panels * w.blocks()) * w.block_bytes());
    for (uint8_t& number : numbers) number = uint8_t((*random)());
    scales.assign(size_t(panels * w.blocks() * kPanel), 0x3c00);  // 2^-7
    w.numbers = numbers.data();
    w.scales = scales.data();
  }
};

struct Inputs {
  std::vector<int8_t> numbers;
  std::vector<float> scales;
  std::vector<int32_t> starts;
  Rounded rounded;

  Inputs(const Kernels& kernels, const Weights& w, std::mt19937* random)
      : numbers(size_t(kRows) * w.blocks() * w.block), scales(kRows * w.blocks()), starts(kRows * w.blocks()) {
    rounded = {numbers.data(), scales.data(), starts.data()};
    std::vector<float> row(kWidth);
    for (int m = 0; m < kRows; ++m) {
      for (float& x : row) x = float(int((*random)() % 2001) - 1000);
      kernels.round_row(w, row.data(), rounded, m);
    }
  }
};

double rate(const Kernels& kernels, const Matrix& matrix, const Inputs& x, int rows) {
  alignas(64) static float sums[kRows * kPanel];
  const int64_t panels = matrix.w.panels(), at_once = std::min<int64_t>(panels, kAtOnce);
  double best = 1e9;
  int64_t first = 0;
  for (int run = 0; run < 150; ++run) {
    const auto start = std::chrono::steady_clock::now();
    for (int64_t panel = first; panel < first + at_once; ++panel) {
      std::memset(sums, 0, sizeof sums);
      kernels.multiply_panel(matrix.w, x.rounded, rows, panel, sums);
    }
    best = std::min(best, seconds(start));
    first = first + 2 * at_once <= panels ? first + at_once : 0;
  }
  return double(at_once * kPanel) * kWidth * rows / best;
}

}  // namespace

int main(int count, char** names) {
  const Kernels* kernels = find_kernels(count > 1 ? names[1] : nullptr);
  if (kernels == nullptr) return std::puts("this processor does not run these kernels"), 1;
  std::printf("Billions of products per second, %s, one thread.\n\n", kernels->name);
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512vnni")) std::printf("The peak of vpdpbusd with 512 bits: %.0f.\n\n", peak() / 1e9);
#endif
  const int rows[] = {1, 4, 6, 8, 12, 16, 24, 48};
  std::printf("| weights | block | from |");
  for (int m : rows) std::printf(" %d rows |", m);
  std::printf("\n|---|---|---|---|---|---|---|---|---|---|---|\n");
  std::mt19937 random(1);
  for (const Case c : {Case{8, 128}, {4, 16}, {4, 32}, {4, 64}, {4, 128}})
    for (const int64_t panels : {int64_t(1), kManyPanels}) {
      const Matrix matrix(c, panels, &random);
      const Inputs x(*kernels, matrix.w, &random);
      std::printf("| int%d | %d | %s |", c.bits, c.block, panels == 1 ? "cache" : "memory");
      for (int m : rows) std::printf(" %.0f |", rate(*kernels, matrix, x, m) / 1e9);
      std::puts("");
    }
}
