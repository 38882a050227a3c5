// The functions that are implemented or compiled separately for each instruction set.
#pragma once

#include "attention.h"
#include "lora.h"
#include "product.h"

namespace glm4 {

struct Kernels {
  const char* name;
  RoundRow round_row;
  MultiplyPanel multiply_panel;
  Gate gate;
  AttentionKernels attention;
  LoraKernels lora;
};

// The fastest kernels that this processor supports. Tests may name kernels; null: the processor does not support them.
const Kernels* choose_kernels(const char* name = nullptr);

}  // namespace glm4
