#include "kernels.h"

#include <cstring>

namespace glm4 {

extern const Kernels kPortableKernels;
#if defined(__x86_64__) && defined(__GNUC__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

const Kernels* choose_kernels(const char* name) {
  const Kernels* fitting[3];
  int count = 0;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    fitting[count++] = &kAvx512Kernels;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) fitting[count++] = &kAvx2Kernels;
#endif
  fitting[count++] = &kPortableKernels;
  if (name == nullptr) return fitting[0];
  for (int i = 0; i < count; ++i)
    if (std::strcmp(fitting[i]->name, name) == 0) return fitting[i];
  return nullptr;
}

}  // namespace glm4
