// Attention of a batch, on threads.
#pragma once

#include "attention.h"
#include "ort_kernel.h"

namespace glm4 {

// Null where the numbers make attention that can be computed; the lengths apart, which come with the data.
const char* refusal(const AttentionShape& shape);
const char* refusal(const AttentionShape& shape, const AttentionData& data);

// Sets `starved` where a thread had no memory, and the output is not whole.
ort::Status* attend(const AttentionKernels& kernels, const AttentionShape& shape, const AttentionData& data,
                    const Threads& threads, bool* starved);

}  // namespace glm4
