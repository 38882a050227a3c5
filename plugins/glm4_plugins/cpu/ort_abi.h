// The part of ONNX Runtime's C API that an operator library needs, by index in the API's function table.
//
// ONNX Runtime only appends to this table, so an index stays valid in all later versions. The newest function used here
// came with API version 17. The API is declared here because ONNX Runtime's wheels contain no headers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t kVersion = 17;

struct Status;
struct Context;
struct KernelInfo;
struct Value;
struct ShapeInfo;
struct Domain;
struct SessionOptions;

enum ElementType { kAnyType = 0, kFloat = 1, kUint8 = 2, kInt8 = 3, kInt32 = 6, kInt64 = 7, kFloat16 = 10, kBfloat16 = 16 };
enum Presence { kRequired = 0, kOptional = 1, kVariadic = 2 };
constexpr int kInvalidArgument = 2;

class Api {
 public:
  explicit Api(const void* table) : table_(static_cast<void* const*>(table)) {}

  Status* error(const char* message) const { return call<Status*(int, const char*)>(0)(kInvalidArgument, message); }
  Status* data(Value* value, void** out) const { return call<Status*(Value*, void**)>(51)(value, out); }
  Status* element_type(const ShapeInfo* info, int* out) const {
    return call<Status*(const ShapeInfo*, int*)>(60)(info, out);
  }
  Status* rank(const ShapeInfo* info, size_t* out) const {
    return call<Status*(const ShapeInfo*, size_t*)>(61)(info, out);
  }
  Status* shape(const ShapeInfo* info, int64_t* axes, size_t count) const {
    return call<Status*(const ShapeInfo*, int64_t*, size_t)>(62)(info, axes, count);
  }
  Status* shape_info(const Value* value, ShapeInfo** out) const {
    return call<Status*(const Value*, ShapeInfo**)>(65)(value, out);
  }
  void release(ShapeInfo* info) const { call<void(ShapeInfo*)>(99)(info); }
  Status* attribute(const KernelInfo* info, const char* name, float* out) const {
    return call<Status*(const KernelInfo*, const char*, float*)>(85)(info, name, out);
  }
  Status* attribute(const KernelInfo* info, const char* name, int64_t* out) const {
    return call<Status*(const KernelInfo*, const char*, int64_t*)>(86)(info, name, out);
  }
  Status* input_count(const Context* context, size_t* out) const {
    return call<Status*(const Context*, size_t*)>(88)(context, out);
  }
  Status* input(const Context* context, size_t index, const Value** out) const {
    return call<Status*(const Context*, size_t, const Value**)>(90)(context, index, out);
  }
  Status* output(Context* context, size_t index, const int64_t* shape, size_t rank, Value** out) const {
    return call<Status*(Context*, size_t, const int64_t*, size_t, Value**)>(91)(context, index, shape, rank, out);
  }
  Status* create_domain(const char* name, Domain** out) const {
    return call<Status*(const char*, Domain**)>(26)(name, out);
  }
  Status* add_operator(Domain* domain, const void* op) const {
    return call<Status*(Domain*, const void*)>(27)(domain, op);
  }
  Status* add_domain(SessionOptions* options, Domain* domain) const {
    return call<Status*(SessionOptions*, Domain*)>(28)(options, domain);
  }
  // Calls work(data, i) for i = 0 ... total - 1 on the session's threads, in `batches` batches that idle threads take.
  Status* parallel_for(const Context* context, void (*work)(void*, size_t), size_t total, size_t batches,
                       void* data) const {
    return call<Status*(const Context*, void (*)(void*, size_t), size_t, size_t, void*)>(274)(context, work, total,
                                                                                             batches, data);
  }

 private:
  template <typename F>
  F* call(size_t position) const {
    return reinterpret_cast<F*>(table_[position]);
  }
  void* const* table_;
};

struct ApiBase {
  const void* (*get_api)(uint32_t version);
  const char* (*version)();
};

// The description of an operator for ONNX Runtime (OrtCustomOp), as of API version 17.
struct Operator {
  uint32_t version;
  void* (*create_kernel)(const Operator*, const void* api, const KernelInfo*);
  const char* (*name)(const Operator*);
  const char* (*provider)(const Operator*);
  int (*input_type)(const Operator*, size_t);
  size_t (*input_count)(const Operator*);
  int (*output_type)(const Operator*, size_t);
  size_t (*output_count)(const Operator*);
  void (*compute)(void*, Context*);
  void (*destroy)(void*);
  int (*input_presence)(const Operator*, size_t);
  int (*output_presence)(const Operator*, size_t);
  int (*input_memory)(const Operator*, size_t);
  int (*variadic_input_minimum)(const Operator*);
  int (*variadic_input_alike)(const Operator*);
  int (*variadic_output_minimum)(const Operator*);
  int (*variadic_output_alike)(const Operator*);
  Status* (*create_kernel_checked)(const Operator*, const void* api, const KernelInfo*, void** kernel);
  Status* (*compute_checked)(void*, Context*);
  Status* (*infer_shapes)(const Operator*, void*);
  int (*first_opset)(const Operator*);
  int (*last_opset)(const Operator*);
};

}  // namespace ort
