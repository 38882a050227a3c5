// Registers the operators with ONNX Runtime.
#include "library.h"

#include <initializer_list>

#include "kernels.h"

GLM4_EXPORT ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
  const void* table = base->get_api(ort::kVersion);
  if (table == nullptr) return nullptr;  // ONNX Runtime < 1.17; it will refuse the unknown operator
  const ort::Api api(table);
  if (glm4::choose_kernels() == nullptr)
    return api.error("GLM4_CPU_KERNELS names kernels that this processor does not support; unset the variable");
  ort::Domain* domain = nullptr;
  if (ort::Status* failed = api.create_domain("glm4", &domain)) return failed;
  for (const ort::Operator* op : {&glm4::kProductOperator, &glm4::kLoraOperator})
    if (ort::Status* failed = api.add_operator(domain, op)) return failed;
  for (const ort::Operator& op : glm4::kAttentionOperators)
    if (ort::Status* failed = api.add_operator(domain, &op)) return failed;
  return api.add_domain(options, domain);
}

// Name of the kernels of this process. Null: the environment names others than this processor supports.
GLM4_EXPORT const char* glm4_kernels() {
  const glm4::Kernels* chosen = glm4::choose_kernels();
  return chosen == nullptr ? nullptr : chosen->name;
}

// Whether this processor supports the kernels of a name.
GLM4_EXPORT int glm4_has_kernels(const char* name) { return glm4::find_kernels(name) != nullptr; }
