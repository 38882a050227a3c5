// The product of rows with a panel, for kernel sets with registers of kLanes sums. The including file must include
// loops.h and attention_loops.h first, and define `Dots<4>` and `Dots<8>`, for 4-bit and 8-bit numbers:
//   kRows, kSums             the most rows of a tile, and registers of sums; at most 8 rows
//   kInputs                  inputs after which running sums of 16 bits are full, a multiple of 8; 0: they have 32 bits
//   kCentred                 whether the sums are of numbers minus the middle of their range
//   Columns columns(Bytes)   prepares four numbers of each of kLanes columns
//   Inputs inputs(const int8_t*)             four numbers of a row of x
//   Ints add(Ints sums, Columns, Inputs)     adds their products to the running sums of the columns
//   Ints total(Ints sums)    the running sums of 16 bits as int32
//   kPairs, sum_pairs        whether pairs of rows have products of their own, and these

#include <cstring>

#include "product.h"

// Keeps the order of the products as written. GCC 12 would load the inputs of all rows first, and spill the sums.
#ifdef __x86_64__
#define GLM4_IN_ORDER(lanes) asm volatile("" : "+x"(lanes))
#else
#define GLM4_IN_ORDER(lanes) asm volatile("" : "+w"(lanes))
#endif

namespace glm4 {
namespace {

using Bytes = uint8_t __attribute__((vector_size(sizeof(Lanes))));

constexpr int kGroup = 4 * kPanel;  // bytes of four inputs of a panel

template <int kBits>
struct Dots;

// A block of a panel, and the rows that are multiplied with it.
struct Block {
  const Weights& w;
  const uint8_t* numbers;
  const Widened& wide;
  const int8_t* x;       // [rows][block]
  const float* x_scales;  // [rows]
  const int32_t* starts;  // [rows]
  float* sums;            // [rows][kPanel]
};

// Fetches part of the next block while this one is computed. A tile narrower than the panel jumps over the other columns,
// and the processor foresees only reads of neighbours.
inline void fetch(const uint8_t* from, int bytes) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

// Registers across a tile of `rows` rows: a power of two, so that tiles fill a panel.
constexpr int across(int rows, int most) {
  int vectors = 1;
  while (2 * vectors * kLanes <= kPanel && 2 * vectors * rows <= most) vectors *= 2;
  return vectors;
}

// Four numbers of each of kLanes columns. With 4 bits, a byte holds numbers of an even and of an odd group.
template <int kBits, int kOdd>
inline Bytes four_numbers(const uint8_t* numbers) {
  Bytes bytes;
  std::memcpy(&bytes, numbers + (kBits == 8 ? kOdd * kGroup : 0), sizeof bytes);
  if (kBits == 8) return bytes;
  return (kOdd ? bytes >> 4 : bytes) & 0x0f;
}

template <typename Dot, typename Columns, typename Inputs>
inline void add_product(Ints& sums, const Columns& columns, const Inputs& inputs) {
  sums = Dot::add(sums, columns, inputs);
  GLM4_IN_ORDER(sums);
}

// Adds the products of four inputs of kM rows and kV registers of columns. Keeps the shorter operand in registers.
template <int kBits, int kOdd, int kM, int kV>
inline void add_four(const uint8_t* numbers, const int8_t* x, int block, Ints (&sums)[kM][kV]) {
  using Dot = Dots<kBits>;
  const auto columns_of = [&](int v) { return Dot::columns(four_numbers<kBits, kOdd>(numbers + v * sizeof(Bytes))); };
  const auto inputs_of = [&](int m) { return Dot::inputs(x + m * block + 4 * kOdd); };
  if constexpr (kM < kV) {
    decltype(inputs_of(0)) inputs[kM];
    GLM4_UNROLL
    for (int m = 0; m < kM; ++m) inputs[m] = inputs_of(m);
    GLM4_UNROLL
    for (int v = 0; v < kV; ++v) {
      const auto columns = columns_of(v);
      GLM4_UNROLL
      for (int m = 0; m < kM; ++m) add_product<Dot>(sums[m][v], columns, inputs[m]);
    }
  } else {
    decltype(columns_of(0)) columns[kV];
    GLM4_UNROLL
    for (int v = 0; v < kV; ++v) columns[v] = columns_of(v);
    GLM4_UNROLL
    for (int m = 0; m < kM; ++m) {
      const auto inputs = inputs_of(m);
      GLM4_UNROLL
      for (int v = 0; v < kV; ++v) add_product<Dot>(sums[m][v], columns[v], inputs);
    }
  }
}

// Adds the products of `count` inputs.
template <int kBits, int kM, int kV>
inline void add_products(const uint8_t* numbers, const int8_t* x, int block, int count, Ints (&sums)[kM][kV]) {
  for (const int8_t* end = x + count; x < end; x += 8, numbers += kBits * kGroup / 4) {
    add_four<kBits, 0>(numbers, x, block, sums);
    add_four<kBits, 1>(numbers, x, block, sums);
  }
}

// Scales the integer sums of a tile and adds them to the float sums. `m`, `n`: the tile's first row and column.
template <int kBits, int kM, int kV>
inline void scale_products(const Block& b, int m, int n, const Ints (&dots)[kM][kV]) {
  GLM4_UNROLL
  for (int i = 0; i < kM; ++i) {
    const int32_t start = b.starts[m + i], sum = -(start >> (kBits - 1));  // of the block's numbers of x
    GLM4_UNROLL
    for (int v = 0; v < kV; ++v) {
      const int column = n + v * kLanes;
      Ints exact = dots[i][v];
      if (!Dots<kBits>::kCentred) exact += start;
      if (b.w.zeros != nullptr) {
        Ints zeros;
        std::memcpy(&zeros, b.wide.zeros + column, sizeof zeros);
        exact -= zeros * sum;
      }
      float* to = b.sums + (m + i) * kPanel + column;
      const Lanes scale = load(b.wide.scales + column) * b.x_scales[m + i];
      store(to, fused(__builtin_convertvector(exact, Lanes), scale, load(to)));
    }
  }
}

template <int kBits, int kM>
__attribute__((noinline)) void multiply_tiles(const Block& b, int m) {
  using Dot = Dots<kBits>;
  constexpr int kV = across(kM, Dot::kSums);
  const int block = b.w.block;
  const int8_t* x = b.x + m * block;
  for (int n = 0; n < kPanel; n += kV * kLanes) {
    const uint8_t* numbers = b.numbers + n * 4;
    if (kV * kLanes < kPanel && m == 0)
      fetch(b.numbers + b.w.block_bytes() + n * block * kBits / 8, kV * kLanes * block * kBits / 8);
    Ints dots[kM][kV] = {};
    if constexpr (Dot::kPairs && kM % 2 == 0) {
      Dot::template sum_pairs<kM, kV>(numbers, x, block, dots);
    } else if constexpr (Dot::kInputs == 0) {
      add_products<kBits>(numbers, x, block, block, dots);
    } else {
      for (int from = 0; from < block; from += Dot::kInputs) {
        Ints sums[kM][kV] = {};
        const int count = block - from < Dot::kInputs ? block - from : Dot::kInputs;
        add_products<kBits>(numbers + from * kPanel * kBits / 8, x + from, block, count, sums);
        GLM4_UNROLL
        for (int i = 0; i < kM; ++i)
          GLM4_UNROLL
          for (int v = 0; v < kV; ++v) dots[i][v] += Dot::total(sums[i][v]);
      }
    }
    scale_products<kBits, kM, kV>(b, m, n, dots);
  }
}

template <int kBits, int kM>
inline void multiply_rest(const Block& b, int m, int rows) {
  if (rows == kM) multiply_tiles<kBits, kM>(b, m);
  if constexpr (kM > 1) {
    if (rows < kM) multiply_rest<kBits, kM - 1>(b, m, rows);
  }
}

template <int kBits>
void multiply_bits(const Weights& w, const Rounded& x, int rows, int64_t panel, float* sums) {
  constexpr int kM = Dots<kBits>::kRows;
  const int64_t blocks = w.blocks();
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t at = panel * blocks + i;
    Widened wide;
    widen_block(w, size_t(at) * kPanel, &wide);
    const Block b = {w, w.numbers + size_t(at) * w.block_bytes(), wide, x.numbers + i * kRows * w.block,
                     x.scales + i * kRows, x.starts + i * kRows, sums};
    int m = 0;
    for (; rows - m >= kM; m += kM) multiply_tiles<kBits, kM>(b, m);
    multiply_rest<kBits, kM - 1>(b, m, rows - m);
  }
}

void multiply_panel(const Weights& w, const Rounded& x, int rows, int64_t panel, float* sums) {
  (w.bits == 8 ? multiply_bits<8> : multiply_bits<4>)(w, x, rows, panel, sums);
}

}  // namespace
}  // namespace glm4
