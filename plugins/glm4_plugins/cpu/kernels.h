// The functions that are implemented or compiled separately for each instruction set.
#pragma once

#include "attention.h"
#include "lora.h"
#include "product.h"

// The first compilers that know AVX-VNNI.
#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : defined(__GNUC__) && __GNUC__ >= 11)
#define GLM4_AVX_VNNI
#endif

// arm_neon.h of earlier compilers lacks the products of 8-bit numbers.
#if defined(__aarch64__) && (defined(__clang__) ? __clang_major__ >= 16 : defined(__GNUC__) && __GNUC__ >= 10)
#define GLM4_NEON
#endif

namespace glm4 {

struct Kernels {
  const char* name;
  RoundRow round_row;
  MultiplyPanel multiply_panel;
  Gate gate;
  AttentionKernels attention;
  LoraKernels lora;
};

constexpr const char* kVariable = "GLM4_CPU_KERNELS";  // of the environment: a name of kernels, instead of the fastest

// The kernels of this name; null: the fastest. Returns null if this processor does not support them.
const Kernels* find_kernels(const char* name);
// The kernels of this process. Null: the variable names kernels that this processor does not support.
const Kernels* choose_kernels();

}  // namespace glm4
