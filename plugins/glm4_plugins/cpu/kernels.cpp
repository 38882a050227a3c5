#include "kernels.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#elif defined(GLM4_NEON) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace glm4 {

extern const Kernels kPortableKernels;

namespace {

struct Candidate {
  const Kernels* kernels;
  bool (*fits)();  // whether this processor has the instructions
};

}  // namespace

#if defined(__x86_64__) && defined(__GNUC__)
extern const Kernels kAvx512Kernels, kAvxVnniKernels, kAvx2Kernels;

namespace {

bool has_avx512_vnni() {
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// Not every compiler knows F16C (conversions of float16) in __builtin_cpu_supports.
bool has_avx2() {
  unsigned a, b, c, d;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) &&
         (c & bit_F16C);
}

bool has_avx_vnni() {
  unsigned a, b, c, d;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4));
}

constexpr Candidate kCandidates[] = {
    {&kAvx512Kernels, has_avx512_vnni},
#ifdef GLM4_AVX_VNNI
    {&kAvxVnniKernels, has_avx_vnni},
#endif
    {&kAvx2Kernels, has_avx2},
    {&kPortableKernels, [] { return true; }},
};

}  // namespace
#elif defined(GLM4_NEON)
extern const Kernels kNeonI8mmKernels, kNeonDotprodKernels;

namespace {

// Of the kernel's headers, in which an old system lacks them.
constexpr unsigned long kHwcapDotprod = 1ul << 20, kHwcap2I8mm = 1ul << 13;

bool has_i8mm() {
#if defined(__ARM_FEATURE_MATMUL_INT8)
  return true;  // the compiler was told that every processor has it
#elif defined(__linux__)
  return getauxval(AT_HWCAP2) & kHwcap2I8mm;
#else
  return false;
#endif
}

bool has_dotprod() {
#if defined(__ARM_FEATURE_DOTPROD)
  return true;
#elif defined(__linux__)
  return getauxval(AT_HWCAP) & kHwcapDotprod;
#else
  return false;
#endif
}

constexpr Candidate kCandidates[] = {
    {&kNeonI8mmKernels, has_i8mm},
    {&kNeonDotprodKernels, has_dotprod},
    {&kPortableKernels, [] { return true; }},
};

}  // namespace
#else
namespace {

constexpr Candidate kCandidates[] = {{&kPortableKernels, [] { return true; }}};

}  // namespace
#endif

const Kernels* find_kernels(const char* name) {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
#endif
  for (const Candidate& one : kCandidates)
    if ((name == nullptr || std::strcmp(one.kernels->name, name) == 0) && one.fits()) return one.kernels;
  return nullptr;
}

const Kernels* choose_kernels() {
  static const Kernels* const chosen = find_kernels(std::getenv(kVariable));
  return chosen;
}

}  // namespace glm4
