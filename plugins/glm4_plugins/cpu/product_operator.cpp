// glm4::BlockQuantizedMatMul for ONNX Runtime's CPU provider, and a C function for the same product.
//
// Inputs: x float32 [..., width]; numbers uint8 [panels, blocks, block * 64 * bits / 8]; scales bfloat16, float16 or
// float32 [panels, blocks, 64]; optional bias float32 [columns]; optional zero points int8 [panels, blocks, 64], the
// distances from the middle of the range. Attributes: columns, width, bits, block_size, gated.
// Output: float32 [..., columns]. If gated: silu(first half of the columns) * second half, [..., columns / 2].
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <vector>

#include "kernels.h"
#include "library.h"
#include "ort_kernel.h"

namespace glm4 {
namespace {

struct Scratch {
  std::vector<int8_t> numbers;
  std::vector<float> scales;
  std::vector<int32_t> starts;

  void reserve(size_t blocks, size_t block) {
    if (numbers.size() < blocks * block) numbers.resize(blocks * block);
    if (scales.size() < blocks) scales.resize(blocks);
    if (starts.size() < blocks) starts.resize(blocks);
  }
};

constexpr int64_t kPieces = 64;  // most pieces; many small ones, so that no thread ends much later than the others

struct Product {
  const Kernels* kernels;
  Weights w;
  bool gated;
  const float* x;
  float* y;
  int64_t rows;
  Scratch* scratch;
  int64_t panels_together = 1;

  int64_t out_columns() const { return gated ? w.columns / 2 : w.columns; }
  int64_t out_panels() const { return (out_columns() + kPanel - 1) / kPanel; }

  ort::Status* run(const Threads& threads) {
    const int64_t groups = (rows + kRows - 1) / kRows;
    scratch->reserve(size_t(groups * kRows * w.blocks()), size_t(w.block));
    ort::Status* failed = nullptr;
    if (rows < kRows / 4)  // too little work for several threads
      for (int64_t row = 0; row < rows; ++row) round(row);
    else
      failed = threads.run([](void* p, size_t row) { static_cast<Product*>(p)->round(int64_t(row)); },
                           size_t(rows), this);
    if (failed != nullptr) return failed;
    panels_together = (out_panels() + kPieces - 1) / kPieces;
    const int64_t pieces = (out_panels() + panels_together - 1) / panels_together;
    return threads.run([](void* p, size_t piece) { static_cast<Product*>(p)->multiply(int64_t(piece)); },
                       size_t(pieces), this);
  }

  Rounded rounded(int64_t group) const {
    const int64_t at = group * kRows * w.blocks();
    return {scratch->numbers.data() + at * w.block, scratch->scales.data() + at, scratch->starts.data() + at};
  }

  void round(int64_t row) const {
    kernels->round_row(w, x + row * w.width, rounded(row / kRows), int(row % kRows));
  }

  void multiply(int64_t piece) const {
    alignas(64) float sums[kRows * kPanel], ups[kRows * kPanel];
    const int64_t first = piece * panels_together;
    for (int64_t panel = first; panel < out_panels() && panel < first + panels_together; ++panel)
      for (int64_t row = 0; row < rows; row += kRows) {
        const Rounded some = rounded(row / kRows);
        const int count = int(rows - row < kRows ? rows - row : kRows);
        sum(some, count, panel, sums);
        if (gated) {
          sum(some, count, panel + out_panels(), ups);
          kernels->gate(sums, ups, count * kPanel);
        }
        store(sums, row, count, panel);
      }
  }

  void sum(const Rounded& some, int count, int64_t panel, float* sums) const {
    std::memset(sums, 0, size_t(count) * kPanel * sizeof(float));
    kernels->multiply_panel(w, some, count, panel, sums);
    if (w.bias == nullptr) return;
    const int64_t column = panel * kPanel;
    const int columns = int(w.columns - column < kPanel ? w.columns - column : kPanel);
    for (int m = 0; m < count; ++m)
      for (int n = 0; n < columns; ++n) sums[m * kPanel + n] += w.bias[column + n];
  }

  void store(const float* sums, int64_t row, int count, int64_t panel) const {
    const int64_t column = panel * kPanel, all = out_columns();
    const size_t columns = size_t(all - column < kPanel ? all - column : kPanel);
    for (int m = 0; m < count; ++m)
      std::memcpy(y + (row + m) * all + column, sums + m * kPanel, columns * sizeof(float));
  }
};

// The reason why the attributes are invalid. Null: they are valid.
const char* refusal(const Weights& w, bool gated) {
  if (w.columns <= 0 || w.width <= 0) return "columns and width must be positive";
  if (w.bits != 8 && w.bits != 4) return "bits must be 8 or 4";
  // The sum of 1024 products of at most 255 * 127 is far below the limit of int32.
  if (w.block <= 0 || w.block % 8 != 0 || w.block > 1024) return "block_size must be a multiple of 8, at most 1024";
  if (gated && w.columns % (2 * kPanel) != 0) return "a gated product must have a multiple of 128 columns";
  return nullptr;
}

bool read_scale_type(int element_type, ScaleType* out) {
  switch (element_type) {
    case ort::kBfloat16: *out = ScaleType::kBfloat16; return true;
    case ort::kFloat16: *out = ScaleType::kFloat16; return true;
    case ort::kFloat: *out = ScaleType::kFloat32; return true;
    default: return false;
  }
}

struct Kernel {
  ort::Api api;
  Weights w;
  bool gated;
};

ort::Status* create(const ort::Operator*, const void* table, const ort::KernelInfo* info, void** out) {
  const ort::Api api(table);
  int64_t columns, width, bits, block, gated;
  GLM4_RETURN(api.attribute(info, "columns", &columns));
  GLM4_RETURN(api.attribute(info, "width", &width));
  GLM4_RETURN(api.attribute(info, "bits", &bits));
  GLM4_RETURN(api.attribute(info, "block_size", &block));
  GLM4_RETURN(api.attribute(info, "gated", &gated));
  if (bits < 0 || bits > 8 || block < 0 || block > 1024) return api.error("BlockQuantizedMatMul: bits or block_size");
  const Weights w = {nullptr, nullptr, ScaleType::kBfloat16, nullptr, nullptr, columns, width, int(bits), int(block)};
  if (const char* why = refusal(w, gated != 0)) return api.error(why);
  *out = new (std::nothrow) Kernel{api, w, gated != 0};
  return *out != nullptr ? nullptr : api.error("BlockQuantizedMatMul: no memory");
}

ort::Status* compute(void* kernel, ort::Context* context) {
  const Kernel& self = *static_cast<const Kernel*>(kernel);
  Weights w = self.w;
  void *x, *numbers, *scales, *bias, *zeros;
  std::vector<int64_t> shape, stored, scaled, biased, shifted;
  int scale_type = ort::kAnyType;
  GLM4_RETURN(read_input(self.api, context, 0, &x, &shape));
  GLM4_RETURN(read_input(self.api, context, 1, &numbers, &stored));
  GLM4_RETURN(read_input(self.api, context, 2, &scales, &scaled, &scale_type));
  GLM4_RETURN(read_input(self.api, context, 3, &bias, &biased));
  GLM4_RETURN(read_input(self.api, context, 4, &zeros, &shifted));
  if (shape.empty() || shape.back() != w.width) return self.api.error("BlockQuantizedMatMul: x is not as wide as W");
  if (stored != std::vector<int64_t>{w.panels(), w.blocks(), int64_t(w.block_bytes())} ||
      scaled != std::vector<int64_t>{w.panels(), w.blocks(), kPanel} ||
      (bias != nullptr && biased != std::vector<int64_t>{w.columns}) || (zeros != nullptr && shifted != scaled))
    return self.api.error("BlockQuantizedMatMul: the stored matrix has not the shape that its attributes say");
  if (!read_scale_type(scale_type, &w.scale_type))
    return self.api.error("BlockQuantizedMatMul: scales must be bfloat16, float16 or float32");
  w.numbers = static_cast<const uint8_t*>(numbers);
  w.scales = scales;
  w.zeros = static_cast<const int8_t*>(zeros);
  w.bias = static_cast<const float*>(bias);
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) rows *= shape[i];
  thread_local Scratch scratch;
  Product product = {choose_kernels(), w, self.gated, static_cast<const float*>(x), nullptr, rows, &scratch};
  shape.back() = product.out_columns();
  ort::Value* output = nullptr;
  GLM4_RETURN(self.api.output(context, 0, shape.data(), shape.size(), &output));
  GLM4_RETURN(self.api.data(output, reinterpret_cast<void**>(&product.y)));
  return rows == 0 ? nullptr : product.run(SessionThreads(self.api, context));
}

struct ProductDescription {
  using State = Kernel;
  static constexpr const char* kName = "BlockQuantizedMatMul";
  static constexpr const char* kNoMemory = "BlockQuantizedMatMul: no memory for the rounded inputs";
  static constexpr auto kCreate = create;
  static constexpr auto kCompute = compute;
  static constexpr Argument kInputs[] = {{ort::kFloat, ort::kRequired},
                                         {ort::kUint8, ort::kRequired},
                                         {ort::kAnyType, ort::kRequired},
                                         {ort::kFloat, ort::kOptional},
                                         {ort::kInt8, ort::kOptional}};
  static constexpr Argument kOutputs[] = {{ort::kFloat, ort::kRequired}};
};

}  // namespace

const ort::Operator kProductOperator = describe<ProductDescription>();

}  // namespace glm4

// The product on one thread. kernels: name of the kernels; null: the fastest. scale_type: ONNX's number of the type.
// Returns 0: done, 1: the processor does not support the kernels, 2: invalid sizes, 3: out of memory.
GLM4_EXPORT int glm4_product(const char* kernels, const float* x, int64_t rows, const uint8_t* numbers,
                             const void* scales, int scale_type, const int8_t* zeros, const float* bias,
                             int64_t columns, int64_t width, int bits, int block, int gated, float* y) {
  const glm4::Kernels* chosen = glm4::find_kernels(kernels);
  if (chosen == nullptr) return 1;
  glm4::Weights w = {numbers, scales, glm4::ScaleType::kBfloat16, zeros, bias, columns, width, bits, block};
  if (rows < 0 || !glm4::read_scale_type(scale_type, &w.scale_type) || glm4::refusal(w, gated != 0) != nullptr) return 2;
  glm4::Scratch scratch;
  glm4::Product product = {chosen, w, gated != 0, x, y, rows, &scratch};
  try {
    product.run(glm4::OneThread());
  } catch (const std::exception&) {
    return 3;
  }
  return 0;
}
