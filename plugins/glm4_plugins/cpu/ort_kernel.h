// Shared parts of the operators: threads, access to inputs, and the common part of their descriptions.
#pragma once

#include <exception>
#include <iterator>
#include <vector>

#include "ort_abi.h"

namespace glm4 {

// Calls work(data, i) for i = 0 ... total - 1, on one or several threads.
struct Threads {
  virtual ort::Status* run(void (*work)(void*, size_t), size_t total, void* data) const = 0;
};

struct SessionThreads : Threads {
  const ort::Api& api;
  const ort::Context* context;
  SessionThreads(const ort::Api& api, const ort::Context* context) : api(api), context(context) {}
  ort::Status* run(void (*work)(void*, size_t), size_t total, void* data) const override {
    return api.parallel_for(context, work, total, total, data);
  }
};

struct OneThread : Threads {
  ort::Status* run(void (*work)(void*, size_t), size_t total, void* data) const override {
    for (size_t i = 0; i < total; ++i) work(data, i);
    return nullptr;
  }
};

#define GLM4_RETURN(expression)                               \
  do {                                                        \
    if (ort::Status* failed = (expression)) return failed;    \
  } while (0)

// Reads data, shape and, if `type` is given, the element type of an input. Data is null if an optional input is absent.
inline ort::Status* read_input(const ort::Api& api, const ort::Context* context, size_t index, void** data,
                               std::vector<int64_t>* shape, int* type = nullptr) {
  const ort::Value* value = nullptr;
  GLM4_RETURN(api.input(context, index, &value));
  *data = nullptr;
  if (value == nullptr) return nullptr;
  ort::ShapeInfo* info = nullptr;
  GLM4_RETURN(api.shape_info(value, &info));
  size_t rank = 0;
  ort::Status* failed = api.rank(info, &rank);
  if (failed == nullptr) {
    shape->resize(rank);
    failed = api.shape(info, shape->data(), rank);
  }
  if (failed == nullptr && type != nullptr) failed = api.element_type(info, type);
  api.release(info);
  if (failed == nullptr) failed = api.data(const_cast<ort::Value*>(value), data);
  return failed;
}

struct Argument {
  int type, presence;
};

// An operator of the CPU provider. D has: State, the type of a kernel, with a member `api`; kName; the functions kCreate
// and kCompute; kNoMemory, the error of a computation without memory; kInputs and kOutputs, arrays of Argument.
template <typename D>
ort::Operator describe() {
  ort::Operator op = {};
  op.version = ort::kVersion;
  op.create_kernel_checked = D::kCreate;
  op.compute_checked = [](void* kernel, ort::Context* context) -> ort::Status* {
    try {
      return D::kCompute(kernel, context);
    } catch (const std::exception&) {  // C callers cannot handle exceptions
      return static_cast<const typename D::State*>(kernel)->api.error(D::kNoMemory);
    }
  };
  op.destroy = [](void* kernel) { delete static_cast<typename D::State*>(kernel); };
  op.name = [](const ort::Operator*) { return D::kName; };
  op.input_count = [](const ort::Operator*) { return std::size(D::kInputs); };
  op.input_type = [](const ort::Operator*, size_t i) { return D::kInputs[i].type; };
  op.input_presence = [](const ort::Operator*, size_t i) { return D::kInputs[i].presence; };
  op.output_count = [](const ort::Operator*) { return std::size(D::kOutputs); };
  op.output_type = [](const ort::Operator*, size_t i) { return D::kOutputs[i].type; };
  op.output_presence = [](const ort::Operator*, size_t i) { return D::kOutputs[i].presence; };
  op.provider = [](const ort::Operator*) { return "CPUExecutionProvider"; };
  op.input_memory = [](const ort::Operator*, size_t) { return 0; };
  op.variadic_input_minimum = [](const ort::Operator*) { return 1; };
  op.variadic_input_alike = [](const ort::Operator*) { return 1; };
  op.variadic_output_minimum = [](const ort::Operator*) { return 1; };
  op.variadic_output_alike = [](const ort::Operator*) { return 1; };
  op.first_opset = [](const ort::Operator*) { return 1; };
  op.last_opset = [](const ort::Operator*) { return INT32_MAX; };
  return op;
}

}  // namespace glm4
