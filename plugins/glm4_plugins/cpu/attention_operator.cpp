// glm4::PartialRopeGqaAttention for ONNX Runtime's CPU provider, and a C function for the same computation.
//
// operator.py defines inputs, outputs and attributes. Other floats than the cache's are float32. With an int8 cache, the
// rows of past and present end with their scales, and one more input has the factors of the keys [kv_heads, head_size].
// If present and past share their memory, only new rows are written.
#include <cstring>
#include <exception>
#include <new>
#include <string>
#include <vector>

#include "attention_run.h"
#include "kernels.h"
#include "library.h"

namespace glm4 {
namespace {

using Shape = std::vector<int64_t>;

enum Input { kQuery, kKey, kValue, kPastKey, kPastValue, kCos, kSin, kPast, kLengths, kFactors, kInputCount };

struct Kernel {
  ort::Api api;
  int64_t heads, kv_heads, rotary;
  float scale;
  CacheType cache;

  ort::Status* error(const char* why) const {
    const std::string message = std::string("PartialRopeGqaAttention: ") + why;
    return api.error(message.c_str());
  }
};

template <CacheType kCache>
ort::Status* create(const ort::Operator*, const void* table, const ort::KernelInfo* info, void** out) {
  Kernel kernel = {ort::Api(table), 0, 0, 0, 0.0f, kCache};
  GLM4_RETURN(kernel.api.attribute(info, "num_heads", &kernel.heads));
  GLM4_RETURN(kernel.api.attribute(info, "kv_num_heads", &kernel.kv_heads));
  GLM4_RETURN(kernel.api.attribute(info, "rotary_embedding_dim", &kernel.rotary));
  GLM4_RETURN(kernel.api.attribute(info, "scale", &kernel.scale));
  if (kernel.kv_heads <= 0 || kernel.heads <= 0 || kernel.heads % kernel.kv_heads != 0)
    return kernel.error("num_heads is no multiple of kv_num_heads");
  *out = new (std::nothrow) Kernel(kernel);
  return *out != nullptr ? nullptr : kernel.error("no memory");
}

// Creates the output `present` and copies the past into it, unless both share their memory.
ort::Status* present(const Kernel& self, ort::Context* context, size_t index, const void* past, const Shape& shape,
                     void** data) {
  ort::Value* value = nullptr;
  GLM4_RETURN(self.api.output(context, index, shape.data(), shape.size(), &value));
  GLM4_RETURN(self.api.data(value, data));
  if (past == nullptr || *data == past) return nullptr;
  size_t bytes = element_bytes(self.cache);
  for (const int64_t axis : shape) bytes *= size_t(axis);
  std::memcpy(*data, past, bytes);
  return nullptr;
}

// Whether an optional input is present. The shape decides, because a present but empty input may have null data.
bool given(const Shape& shape) { return !shape.empty(); }

ort::Status* compute(void* kernel, ort::Context* context) {
  const Kernel& self = *static_cast<const Kernel*>(kernel);
  void* at[kInputCount];
  Shape shapes[kInputCount];
  for (size_t i = 0; i < kInputCount; ++i) GLM4_RETURN(read_input(self.api, context, i, &at[i], &shapes[i]));
  const Shape& query = shapes[kQuery];
  if (query.size() != 3 || query[2] <= 0 || query[2] % self.heads != 0)
    return self.error("query is not [batch, sequence, num_heads * head_size]");
  const int64_t dim = query[2] / self.heads;
  const bool has_past = given(shapes[kPastKey]);
  if (given(shapes[kPastValue]) != has_past || given(shapes[kPast]) != has_past)
    return self.error("past_key, past_value and past_lengths come together or not at all");
  const int64_t capacity = has_past && shapes[kPastKey].size() == 4 ? shapes[kPastKey][2] : query[1];
  const Shape cache = {query[0], self.kv_heads, capacity, row_elements(self.cache, dim)};
  const Shape added = {query[0], query[1], self.kv_heads * dim}, batch = {query[0]}, factors = {self.kv_heads, dim};
  if (shapes[kKey] != added || shapes[kValue] != added || shapes[kLengths] != batch)
    return self.error("key, value or query_lengths does not fit the query");
  if (has_past && (shapes[kPastKey] != cache || shapes[kPastValue] != cache || shapes[kPast] != batch))
    return self.error("past_key, past_value or past_lengths does not fit the query");
  if (shapes[kCos].size() != 2 || shapes[kCos][1] != self.rotary / 2 || shapes[kSin] != shapes[kCos])
    return self.error("cos and sin are not [positions, rotary_embedding_dim / 2]");
  const bool quantized = self.cache == CacheType::kInt8;
  if (quantized && shapes[kFactors] != factors)
    return self.error("the factors of the keys are not [kv_num_heads, head_size]");
  if (!quantized && given(shapes[kFactors])) return self.error("factors of the keys are for an int8 cache only");
  const AttentionShape shape = {query[0], query[1], capacity, self.kv_heads, self.heads / self.kv_heads, dim,
                                self.rotary, shapes[kCos][0], self.scale, self.cache};
  AttentionData data = {};
  data.query = static_cast<const float*>(at[kQuery]);
  data.key = static_cast<const float*>(at[kKey]);
  data.value = static_cast<const float*>(at[kValue]);
  data.cos = static_cast<const float*>(at[kCos]);
  data.sin = static_cast<const float*>(at[kSin]);
  data.past = has_past ? static_cast<const int32_t*>(at[kPast]) : nullptr;
  data.lengths = static_cast<const int32_t*>(at[kLengths]);
  if (quantized) data.factors = static_cast<const float*>(at[kFactors]);
  if (const char* why = refusal(shape)) return self.error(why);
  if (const char* why = refusal(shape, data)) return self.error(why);
  ort::Value* output = nullptr;
  GLM4_RETURN(self.api.output(context, 0, query.data(), query.size(), &output));
  GLM4_RETURN(self.api.data(output, reinterpret_cast<void**>(&data.output)));
  GLM4_RETURN(present(self, context, 1, at[kPastKey], cache, &data.keys));
  GLM4_RETURN(present(self, context, 2, at[kPastValue], cache, &data.values));
  bool starved = false;
  GLM4_RETURN(attend(choose_kernels()->attention, shape, data, SessionThreads(self.api, context), &starved));
  return starved ? self.error("no memory for the scores") : nullptr;
}

constexpr int element_type(CacheType cache) {
  switch (cache) {
    case CacheType::kFloat16: return ort::kFloat16;
    case CacheType::kBfloat16: return ort::kBfloat16;
    case CacheType::kInt8: return ort::kInt8;
    default: return ort::kFloat;
  }
}

template <CacheType kCache>
struct AttentionDescription {
  using State = Kernel;
  static constexpr const char* kName = "PartialRopeGqaAttention";
  static constexpr const char* kNoMemory = "PartialRopeGqaAttention: no memory for the scores";
  static constexpr auto kCreate = create<kCache>;
  static constexpr auto kCompute = compute;
  static constexpr Argument kCacheRows = {element_type(kCache), ort::kRequired};
  static constexpr Argument kPastRows = {element_type(kCache), ort::kOptional};
  static constexpr Argument kFloats = {ort::kFloat, ort::kRequired};
  static constexpr Argument kInputs[] = {  // in the order of Input
      kFloats, kFloats, kFloats, kPastRows, kPastRows, kFloats, kFloats, {ort::kInt32, ort::kOptional},
      {ort::kInt32, ort::kRequired}, {ort::kFloat, ort::kOptional}};
  static constexpr Argument kOutputs[] = {kFloats, kCacheRows, kCacheRows};
};

}  // namespace

const ort::Operator kAttentionOperators[4] = {describe<AttentionDescription<CacheType::kFloat32>>(),
                                              describe<AttentionDescription<CacheType::kFloat16>>(),
                                              describe<AttentionDescription<CacheType::kBfloat16>>(),
                                              describe<AttentionDescription<CacheType::kInt8>>()};

}  // namespace glm4

// Attention on one thread. The cache (keys, values) is modified.
// kernels: name of the kernels; null: the fastest. sizes: batch, sequence, capacity, kv_heads, group, dim, rotary and
// positions. cache: a CacheType. factors: of the keys; null: all are 1.
// Returns 0: done, 1: the processor does not support the kernels, 2: invalid sizes, 3: out of memory.
GLM4_EXPORT int glm4_attention(const char* kernels, const int64_t* sizes, int cache, float scale, const float* query,
                               const float* key, const float* value, void* keys, void* values, const float* cos,
                               const float* sin, const int32_t* past, const int32_t* lengths, const float* factors,
                               float* output) {
  const glm4::Kernels* chosen = glm4::find_kernels(kernels);
  if (chosen == nullptr) return 1;
  const glm4::AttentionShape shape = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4],
                                      sizes[5], sizes[6], sizes[7], scale,    glm4::CacheType(cache)};
  const glm4::AttentionData data = {query, key, value, cos, sin, past, lengths, keys, values, factors, output};
  if (glm4::refusal(shape) != nullptr || glm4::refusal(shape, data) != nullptr) return 2;
  bool starved = false;
  try {
    glm4::attend(chosen->attention, shape, data, glm4::OneThread(), &starved);
  } catch (const std::exception&) {
    return 3;
  }
  return starved ? 3 : 0;
}
