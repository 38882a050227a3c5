// Compares every kernel set that the processor supports with the portable one, bit by bit, on random shapes:
//     kernels_agree [SET]...
// Prints the supported sets. The sets that are named must be supported. Ends with 1 if a result differs.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "attention.h"
#include "kernels.h"

extern "C" {
int glm4_product(const char*, const float*, int64_t, const uint8_t*, const void*, int, const int8_t*, const float*,
                 int64_t, int64_t, int, int, int, float*);
int glm4_lora(const char*, const float*, const float*, int64_t, int64_t, int64_t, const int64_t*, const uint16_t*,
              int64_t, int, float*);
int glm4_attention(const char*, const int64_t*, int, float, const float*, const float*, const float*, void*, void*,
                   const float*, const float*, const int32_t*, const int32_t*, const float*, float*);
}

namespace {

constexpr const char* kSets[] = {"avx512-vnni", "avx-vnni", "avx2", "neon-i8mm", "neon-dotprod", "portable"};
constexpr int kFloat = 1, kFloat16 = 10, kBfloat16 = 16;  // ONNX's numbers of the types

std::mt19937 draws(1);
int draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(draws); }
float draw_float() { return std::normal_distribution<float>()(draws); }

std::vector<float> floats(size_t count) {
  std::vector<float> values(count);
  for (float& value : values) value = draw_float();
  return values;
}

using Results = std::vector<std::vector<float>>;  // by set

void compare(const char* what, int number, const std::vector<std::string>& sets, const Results& results) {
  for (size_t i = 1; i < sets.size(); ++i)
    if (std::memcmp(results[i].data(), results[0].data(), results[0].size() * sizeof(float)) != 0) {
      std::printf("%s %d: %s and %s differ\n", what, number, sets[i].c_str(), sets[0].c_str());
      std::exit(1);
    }
}

void require_done(int code) {
  if (code == 0) return;
  std::printf("a kernel set returned %d\n", code);
  std::exit(1);
}

// Numbers at the ends of the range, which saturate sums of 16 bits, in every third case.
void product(int number, const std::vector<std::string>& sets) {
  const int bits = draw(0, 1) ? 8 : 4, block = 8 * draw(1, 24), gated = draw(0, 4) == 0;
  const int64_t columns = gated ? 128 * draw(1, 2) : draw(1, 150), width = draw(1, 500), rows = draw(1, 60);
  const int64_t panels = (columns + 63) / 64, blocks = (width + block - 1) / block;
  const bool extreme = number % 3 == 0;
  std::vector<uint8_t> numbers(size_t(panels * blocks * block * 64 * bits / 8));
  for (uint8_t& one : numbers) one = uint8_t(extreme ? (draw(0, 1) ? 255 : 0) : draw(0, 255));
  constexpr int kTypes[] = {kBfloat16, kFloat16, kFloat};
  const int type = kTypes[draw(0, 2)];
  std::vector<uint16_t> narrow(size_t(panels * blocks * 64));
  for (uint16_t& one : narrow) one = uint16_t(draw(0x2000, 0x3fff));
  const std::vector<float> wide = floats(narrow.size()), bias = floats(size_t(columns));
  std::vector<int8_t> zeros(narrow.size());
  for (int8_t& one : zeros) one = int8_t(draw(-(1 << (bits - 1)), (1 << (bits - 1)) - 1));
  std::vector<float> x = floats(size_t(rows * width));
  if (extreme)
    for (float& one : x) one = one < 0 ? -1 : 1;
  const bool shifted = draw(0, 1), biased = draw(0, 1);
  Results results;
  for (const std::string& set : sets) {
    results.emplace_back(size_t(rows * (gated ? columns / 2 : columns)));
    const void* scales = type == kFloat ? static_cast<const void*>(wide.data()) : narrow.data();
    require_done(glm4_product(set.c_str(), x.data(), rows, numbers.data(), scales, type,
                              shifted ? zeros.data() : nullptr, biased ? bias.data() : nullptr, columns, width, bits,
                              block, gated, results.back().data()));
  }
  compare("product", number, sets, results);
}

void lora(int number, const std::vector<std::string>& sets) {
  const int64_t rows = draw(1, 9), inputs = draw(1, 1500), outputs = draw(1, 200), rank = draw(1, 40);
  const int64_t panels = (outputs + 63) / 64, wide = panels * rank * 64;
  const int64_t entries[10] = {rank, 0, inputs * rank, 0, panels};
  std::vector<uint16_t> elements(size_t(inputs * rank + wide));
  for (uint16_t& one : elements) one = uint16_t(draw(0, 1) << 15 | draw(0, 0x3bff));  // subnormal numbers too
  const std::vector<float> x = floats(size_t(rows * inputs)), y = floats(size_t(rows * outputs));
  Results results;
  for (const std::string& set : sets) {
    results.emplace_back(size_t(rows * outputs));
    require_done(glm4_lora(set.c_str(), x.data(), y.data(), rows, inputs, outputs, entries, elements.data(),
                           int64_t(elements.size()), 0, results.back().data()));
  }
  compare("LoRA", number, sets, results);
}

void attention(int number, int cache, const std::vector<std::string>& sets) {
  const int64_t batch = draw(1, 3), sequence = draw(1, 40), heads = draw(1, 3), group = draw(1, 9);
  const int64_t dim = 2 * draw(4, 64), capacity = 400, rotary = 2 * draw(0, int(dim / 2));
  const int64_t sizes[] = {batch, sequence, capacity, heads, group, dim, rotary, capacity};
  const int64_t row = cache == 0 ? dim * 4 : cache == 3 ? dim + 4 : dim * 2;  // bytes
  const auto query = floats(size_t(batch * sequence * heads * group * dim));
  const auto key = floats(size_t(batch * sequence * heads * dim)), value = floats(key.size());
  const auto cos = floats(size_t(capacity * (rotary / 2) + 1)), sin = floats(cos.size());
  const std::vector<int32_t> past(batch, 0), lengths(batch, int32_t(sequence));
  std::vector<float> factors(size_t(heads * dim));
  for (float& one : factors) one = 0.5f + draw(0, 100) / 100.0f;
  Results results;
  for (const std::string& set : sets) {
    std::vector<char> keys(size_t(batch * heads * capacity * row)), values(keys.size());
    results.emplace_back(query.size());
    require_done(glm4_attention(set.c_str(), sizes, cache, 0.1f, query.data(), key.data(), value.data(), keys.data(),
                                values.data(), cos.data(), sin.data(), past.data(), lengths.data(),
                                cache == 3 ? factors.data() : nullptr, results.back().data()));
    const size_t bytes = keys.size() / sizeof(float) * sizeof(float);  // the cache counts as a result
    std::vector<float>& all = results.back();
    for (const auto* stored : {&keys, &values}) {
      const size_t from = all.size();
      all.resize(from + bytes / sizeof(float));
      std::memcpy(all.data() + from, stored->data(), bytes);
    }
  }
  compare("attention", number, sets, results);
}

}  // namespace

int main(int count, char** names) {
  std::vector<std::string> sets = {"portable"}, fused;
  for (const char* name : kSets)
    if (glm4::find_kernels(name) != nullptr) {
      std::printf("%s\n", name);
      if (std::strcmp(name, "portable") != 0) {
        sets.push_back(name);
        fused.push_back(name);
      }
    }
  for (int i = 1; i < count; ++i)
    if (glm4::find_kernels(names[i]) == nullptr) {
      std::printf("%s is not supported\n", names[i]);
      return 1;
    }
  for (int i = 0; i < 150; ++i) product(i, sets);
  for (int i = 0; i < 40; ++i) lora(i, sets);
  for (int i = 0; i < 12; ++i) attention(i, 3, sets);  // integer sums: all sets agree
  for (int i = 0; i < 12 && fused.size() > 1; ++i) attention(i, i % 3, fused);
  std::printf("all agree; chosen: %s\n", glm4::choose_kernels()->name);
  return 0;
}
