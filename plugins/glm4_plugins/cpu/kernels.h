// What is written, or compiled, once for each kind of processor.
#pragma once

#include "attention.h"
#include "product.h"

namespace glm4 {

struct Kernels {
  const char* name;
  RoundRow round_row;
  MultiplyPanel multiply_panel;
  Gate gate;
  AttentionKernels attention;
};

// The fastest that this processor runs; or the one named, null where it does not run it. For tests.
const Kernels* choose_kernels(const char* name = nullptr);

}  // namespace glm4
