#include "kernels.h"

#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

namespace glm4 {

extern const Kernels kPortableKernels;
#if defined(__x86_64__) && defined(__GNUC__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;

// Conversions of float16. Not every compiler knows this name in __builtin_cpu_supports.
static bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

const Kernels* choose_kernels(const char* name) {
  const Kernels* fitting[3];
  int count = 0;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    fitting[count++] = &kAvx512Kernels;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) fitting[count++] = &kAvx2Kernels;
#endif
  fitting[count++] = &kPortableKernels;
  if (name == nullptr) return fitting[0];
  for (int i = 0; i < count; ++i)
    if (std::strcmp(fitting[i]->name, name) == 0) return fitting[i];
  return nullptr;
}

}  // namespace glm4
