// The operators of the library, and the macro for its exported functions.
#pragma once

#include "ort_abi.h"

#define GLM4_EXPORT extern "C" __attribute__((visibility("default")))

namespace glm4 {

extern const ort::Operator kProductOperator;
extern const ort::Operator kAttentionOperators[4];  // one name; ONNX Runtime selects by the cache's type
extern const ort::Operator kLoraOperator;

}  // namespace glm4
