// Registers the operators with ONNX Runtime.
#include "library.h"

#include <initializer_list>

#include "kernels.h"

GLM4_EXPORT ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
  const void* table = base->get_api(ort::kVersion);
  if (table == nullptr) return nullptr;  // ONNX Runtime < 1.17; it will refuse the unknown operator
  const ort::Api api(table);
  ort::Domain* domain = nullptr;
  if (ort::Status* failed = api.create_domain("glm4", &domain)) return failed;
  for (const ort::Operator* op : {&glm4::kProductOperator, &glm4::kLoraOperator})
    if (ort::Status* failed = api.add_operator(domain, op)) return failed;
  for (const ort::Operator& op : glm4::kAttentionOperators)
    if (ort::Status* failed = api.add_operator(domain, &op)) return failed;
  return api.add_domain(options, domain);
}

// Name of the fastest kernels that this processor supports.
GLM4_EXPORT const char* glm4_kernels() { return glm4::choose_kernels()->name; }
