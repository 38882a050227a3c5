// glm4::LoraProduct for ONNX Runtime's CPU provider, and a C function for the same sum.
//
// Inputs: x float32 [sequences, length, inputs], the input of a product; y float32 [sequences, length, outputs], its
// result; rows int64 [sequences], the adapter of each sequence, or -1; places int64 [adapters, matrices, 2, 5]; then
// the adapters, float16 [elements] each.
// Attributes: matrix, the index in `places`; gated.
// Output: float32 [sequences, length, outputs], y + (x A) B. If gated: silu(first half) * second half of this sum.
//
// A matrix of an adapter has up to two parts, such as the gate and the up half. An entry of `places` is the part's
// rank (0: no part), the position of A and of B in the adapter's elements, B's first panel and B's number of panels.
#include <algorithm>
#include <cstring>
#include <exception>
#include <new>
#include <vector>

#include "kernels.h"
#include "library.h"
#include "ort_kernel.h"

namespace glm4 {
namespace {

constexpr int kParts = 2, kEntry = 5;
constexpr int64_t kMostTasks = 64;        // as in product_operator.cpp
constexpr int64_t kWorthThreads = 300000;  // multiplications for each row of a tile; they take about 20 us

struct Part {
  const uint16_t *a, *b;
  int64_t rank, first, panels;
  bool covers(int64_t panel) const { return rank > 0 && panel >= first && panel < first + panels; }
};

struct AdapterParts {
  Part parts[kParts];
};

// At most kLoraRows rows of x with one adapter. `adapter` is null without an adapter.
struct Tile {
  const AdapterParts* adapter;
  int rows;
  int64_t row[kLoraRows];
};

struct LoraScratch {
  std::vector<AdapterParts> adapters;
  std::vector<Tile> tiles;
  std::vector<float> sums;  // [chunks][tiles][kParts][kLoraRows][stride]
};

struct Lora {
  const Kernels* kernels;
  const float *x, *y;
  float* out;
  int64_t inputs, outputs;
  bool gated;
  int64_t stride;
  LoraScratch* scratch;

  int64_t chunks() const { return (inputs + kLoraChunk - 1) / kLoraChunk; }
  int64_t out_columns() const { return gated ? outputs / 2 : outputs; }
  int64_t out_panels() const { return (out_columns() + kPanel - 1) / kPanel; }
  int64_t panels_together() const { return (out_panels() + kMostTasks - 1) / kMostTasks; }
  int64_t tiles() const { return int64_t(scratch->tiles.size()); }
  size_t part_floats() const { return size_t(kLoraRows) * size_t(stride); }
  float* sums(int64_t chunk, int64_t tile, int part) const {
    return scratch->sums.data() + size_t((chunk * tiles() + tile) * kParts + part) * part_floats();
  }

  ort::Status* run(const Threads& threads) {
    if (stride > 0) {
      scratch->sums.resize(size_t(chunks() * tiles() * kParts) * part_floats());
      GLM4_RETURN(run_tasks(threads, [](void* p, size_t i) { static_cast<Lora*>(p)->narrow(int64_t(i)); },
                            chunks() * tiles(), inputs));
      for (int64_t tile = 0; tile < tiles(); ++tile) add_chunks(tile);
    }
    const int64_t tasks = (out_panels() + panels_together() - 1) / panels_together();
    return run_tasks(threads, [](void* p, size_t i) { static_cast<Lora*>(p)->widen(int64_t(i)); }, tasks, outputs);
  }

  // `width`: the number of inputs or outputs of each row. Little work is done by the calling thread, because it takes
  // less time than to start the others.
  ort::Status* run_tasks(const Threads& threads, void (*work)(void*, size_t), int64_t tasks, int64_t width) {
    if (tiles() * (stride + 1) * width >= kWorthThreads) return threads.run(work, size_t(tasks), this);
    for (int64_t i = 0; i < tasks; ++i) work(this, size_t(i));
    return nullptr;
  }

  void narrow(int64_t task) const {
    const int64_t chunk = task / tiles(), first = chunk * kLoraChunk;
    const Tile& tile = scratch->tiles[size_t(task % tiles())];
    if (tile.adapter == nullptr) return;
    const int64_t count = std::min<int64_t>(kLoraChunk, inputs - first);
    const float* rows[kLoraRows];
    for (int m = 0; m < tile.rows; ++m) rows[m] = x + tile.row[m] * inputs + first;
    for (int p = 0; p < kParts; ++p) {
      const Part& part = tile.adapter->parts[p];
      if (part.rank > 0)
        kernels->lora.narrow(rows, tile.rows, part.a + first * part.rank, count, part.rank,
                             sums(chunk, task % tiles(), p), stride);
    }
  }

  void add_chunks(int64_t tile) const {
    const AdapterParts* adapter = scratch->tiles[size_t(tile)].adapter;
    for (int p = 0; adapter != nullptr && p < kParts; ++p)
      for (int m = 0; m < scratch->tiles[size_t(tile)].rows; ++m)
        for (int64_t chunk = 1; chunk < chunks(); ++chunk)
          for (int64_t r = 0; r < adapter->parts[p].rank; ++r)
            sums(0, tile, p)[m * stride + r] += sums(chunk, tile, p)[m * stride + r];
  }

  void widen(int64_t task) const {
    alignas(64) float sum[kLoraRows * kPanel], up[kLoraRows * kPanel];
    const int64_t first = task * panels_together(), last = std::min(first + panels_together(), out_panels());
    for (int64_t at = 0; at < tiles(); ++at)  // outside, so that each adapter is read in the order of its elements
      for (int64_t panel = first; panel < last; ++panel) {
        const Tile& tile = scratch->tiles[size_t(at)];
        add(at, panel, sum);
        if (gated) {
          add(at, panel + out_panels(), up);
          kernels->gate(sum, up, tile.rows * kPanel);
        }
        const size_t columns = size_t(std::min<int64_t>(kPanel, out_columns() - panel * kPanel));
        for (int m = 0; m < tile.rows; ++m)
          std::memcpy(out + tile.row[m] * out_columns() + panel * kPanel, sum + m * kPanel, columns * sizeof(float));
      }
  }

  // Stores a panel of y + (x A) B.
  void add(int64_t at, int64_t panel, float* sum) const {
    const Tile& tile = scratch->tiles[size_t(at)];
    const size_t columns = size_t(std::min<int64_t>(kPanel, outputs - panel * kPanel));
    for (int m = 0; m < tile.rows; ++m) {
      std::memcpy(sum + m * kPanel, y + tile.row[m] * outputs + panel * kPanel, columns * sizeof(float));
      std::fill(sum + m * kPanel + columns, sum + (m + 1) * kPanel, 0.0f);
    }
    for (int p = 0; tile.adapter != nullptr && p < kParts; ++p) {
      const Part& part = tile.adapter->parts[p];
      if (part.covers(panel))
        kernels->lora.widen(sums(0, at, p), stride, tile.rows, part.b + (panel - part.first) * part.rank * kPanel,
                            part.rank, sum);
    }
  }
};

// Reads an adapter's entries of `places`. False: an entry is not within the adapter or the matrix.
bool read_parts(const int64_t* entries, const uint16_t* elements, int64_t count, int64_t inputs, int64_t outputs,
                AdapterParts* to) {
  const int64_t panels = (outputs + kPanel - 1) / kPanel;
  for (int p = 0; p < kParts; ++p, entries += kEntry) {
    const int64_t rank = entries[0], a = entries[1], b = entries[2], first = entries[3], length = entries[4];
    to->parts[p] = {nullptr, nullptr, 0, 0, 0};
    if (rank == 0) continue;
    if (rank < 0 || rank > count || inputs > count / rank || a < 0 || a > count || first < 0 || length <= 0 || first > panels ||
        length > panels - first || b < a + inputs * rank || length > count / (rank * kPanel) ||
        b > count - length * rank * kPanel)
      return false;
    to->parts[p] = {elements + a, elements + b, rank, first, length};
  }
  return true;
}

// Groups the rows of all sequences by adapter, in tiles. Returns the largest stride of the narrow sums.
int64_t make_tiles(const int64_t* rows, int64_t sequences, int64_t length, LoraScratch* scratch) {
  int64_t stride = 0;
  scratch->tiles.clear();
  for (int64_t first = 0; first < sequences; ++first) {
    if (std::find(rows, rows + first, rows[first]) != rows + first) continue;  // its adapter was grouped already
    const AdapterParts* adapter = rows[first] < 0 ? nullptr : &scratch->adapters[size_t(rows[first])];
    for (int p = 0; adapter != nullptr && p < kParts; ++p)
      stride = std::max(stride, lora_stride(adapter->parts[p].rank));
    int filled = kLoraRows;
    for (int64_t s = first; s < sequences; ++s)
      for (int64_t i = 0; rows[s] == rows[first] && i < length; ++i) {
        if (filled == kLoraRows) {
          scratch->tiles.push_back({adapter, 0, {}});
          filled = 0;
        }
        scratch->tiles.back().row[filled] = s * length + i;
        scratch->tiles.back().rows = ++filled;
      }
  }
  return stride;
}

struct LoraKernel {
  ort::Api api;
  int64_t matrix, gated;
};

ort::Status* create(const ort::Operator*, const void* table, const ort::KernelInfo* info, void** out) {
  const ort::Api api(table);
  int64_t matrix, gated;
  GLM4_RETURN(api.attribute(info, "matrix", &matrix));
  GLM4_RETURN(api.attribute(info, "gated", &gated));
  *out = new (std::nothrow) LoraKernel{api, matrix, gated};
  return *out != nullptr ? nullptr : api.error("LoraProduct: no memory");
}

ort::Status* read_adapters(const LoraKernel& self, const ort::Context* context, const Lora& lora, LoraScratch* scratch,
                           const int64_t* rows, int64_t sequences) {
  size_t count = 0;
  GLM4_RETURN(self.api.input_count(context, &count));
  void* places;
  std::vector<int64_t> shape, length;
  GLM4_RETURN(read_input(self.api, context, 3, &places, &shape));
  const int64_t adapters = int64_t(count) - 4;
  if (shape.size() != 4 || shape[0] != adapters || shape[2] != kParts || shape[3] != kEntry || self.matrix < 0 ||
      self.matrix >= shape[1])
    return self.api.error("LoraProduct: places must be [adapters, matrices, 2, 5]");
  scratch->adapters.assign(size_t(adapters), AdapterParts());
  for (int64_t s = 0; s < sequences; ++s) {
    if (rows[s] < -1 || rows[s] >= adapters) return self.api.error("LoraProduct: rows has an adapter that is not there");
    if (rows[s] < 0) continue;
    void* elements;
    GLM4_RETURN(read_input(self.api, context, size_t(rows[s] + 4), &elements, &length));
    if (length.size() != 1) return self.api.error("LoraProduct: an adapter must be [elements]");
    const int64_t* entries = static_cast<const int64_t*>(places) + (rows[s] * shape[1] + self.matrix) * kParts * kEntry;
    if (!read_parts(entries, static_cast<const uint16_t*>(elements), length[0], lora.inputs, lora.outputs,
                    &scratch->adapters[size_t(rows[s])]))
      return self.api.error("LoraProduct: an entry of places is not within its adapter");
  }
  return nullptr;
}

ort::Status* compute(void* kernel, ort::Context* context) {
  const LoraKernel& self = *static_cast<const LoraKernel*>(kernel);
  void *x, *y, *rows;
  std::vector<int64_t> narrow, wide, sequences;
  GLM4_RETURN(read_input(self.api, context, 0, &x, &narrow));
  GLM4_RETURN(read_input(self.api, context, 1, &y, &wide));
  GLM4_RETURN(read_input(self.api, context, 2, &rows, &sequences));
  if (narrow.size() != 3 || wide.size() != 3 || sequences != std::vector<int64_t>{narrow[0]} || wide[0] != narrow[0] ||
      wide[1] != narrow[1])
    return self.api.error("LoraProduct: x, y and rows do not have the same sequences");
  if (self.gated && wide[2] % (2 * kPanel) != 0)
    return self.api.error("LoraProduct: a gated product must have a multiple of 128 columns");
  thread_local LoraScratch scratch;
  Lora lora = {choose_kernels(), static_cast<const float*>(x), static_cast<const float*>(y), nullptr, narrow[2], wide[2],
               self.gated != 0, 0, &scratch};
  const auto* chosen = static_cast<const int64_t*>(rows);
  GLM4_RETURN(read_adapters(self, context, lora, &scratch, chosen, sequences[0]));
  lora.stride = make_tiles(chosen, sequences[0], narrow[1], &scratch);
  wide[2] = lora.out_columns();
  ort::Value* output = nullptr;
  GLM4_RETURN(self.api.output(context, 0, wide.data(), wide.size(), &output));
  GLM4_RETURN(self.api.data(output, reinterpret_cast<void**>(&lora.out)));
  return lora.tiles() == 0 ? nullptr : lora.run(SessionThreads(self.api, context));
}

struct LoraDescription {
  using State = LoraKernel;
  static constexpr const char* kName = "LoraProduct";
  static constexpr const char* kNoMemory = "LoraProduct: no memory for the narrow sums";
  static constexpr auto kCreate = create;
  static constexpr auto kCompute = compute;
  static constexpr Argument kInputs[] = {{ort::kFloat, ort::kRequired},
                                         {ort::kFloat, ort::kRequired},
                                         {ort::kInt64, ort::kRequired},
                                         {ort::kInt64, ort::kRequired},
                                         {ort::kFloat16, ort::kVariadic}};
  static constexpr Argument kOutputs[] = {{ort::kFloat, ort::kRequired}};
};

}  // namespace

const ort::Operator kLoraOperator = describe<LoraDescription>();

}  // namespace glm4

// The sum on one thread, with one adapter for all rows, or none (elements is null). entries: [2][5], see above.
// kernels: name of the kernels; null: the fastest.
// Returns 0: done, 1: the processor does not support the kernels, 2: invalid sizes, 3: out of memory.
GLM4_EXPORT int glm4_lora(const char* kernels, const float* x, const float* y, int64_t rows, int64_t inputs,
                          int64_t outputs, const int64_t* entries, const uint16_t* elements, int64_t count, int gated,
                          float* out) {
  const glm4::Kernels* chosen = glm4::find_kernels(kernels);
  if (chosen == nullptr) return 1;
  glm4::LoraScratch scratch;
  try {
    scratch.adapters.resize(1);
    const int64_t adapter = elements == nullptr ? -1 : 0;
    if (rows < 0 || inputs <= 0 || outputs <= 0 || (gated && outputs % (2 * glm4::kPanel) != 0) ||
        (adapter == 0 && !glm4::read_parts(entries, elements, count, inputs, outputs, &scratch.adapters[0])))
      return 2;
    const int64_t stride = glm4::make_tiles(&adapter, 1, rows, &scratch);
    glm4::Lora lora = {chosen, x, y, out, inputs, outputs, gated != 0, stride, &scratch};
    lora.run(glm4::OneThread());
  } catch (const std::exception&) {
    return 3;
  }
  return 0;
}
