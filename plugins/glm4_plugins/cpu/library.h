// The operators of the library, and what it exports.
#pragma once

#include "ort_abi.h"

#define GLM4_EXPORT extern "C" __attribute__((visibility("default")))

namespace glm4 {

extern const ort::Operator kProductOperator;
extern const ort::Operator kAttentionOperator;      // with a float32 cache, or none
extern const ort::Operator kInt8AttentionOperator;  // the same name; ONNX Runtime chooses by the cache's type

}  // namespace glm4
