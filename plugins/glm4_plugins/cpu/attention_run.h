// Multithreaded attention of a batch.
#pragma once

#include "attention.h"
#include "ort_kernel.h"

namespace glm4 {

// The reason why the sizes, or the lengths in the data, are invalid. Null: they are valid.
const char* refusal(const AttentionShape& shape);
const char* refusal(const AttentionShape& shape, const AttentionData& data);

// Computes `data.output` and the cache. Sets `starved` if a thread ran out of memory; then the output is incomplete.
ort::Status* attend(const AttentionKernels& kernels, const AttentionShape& shape, const AttentionData& data,
                    const Threads& threads, bool* starved);

}  // namespace glm4
