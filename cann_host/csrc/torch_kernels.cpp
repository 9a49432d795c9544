#include "torch_kernels.h"

#include "bindings.h"

namespace cann_host {
int CopyKernelOldAbi(const char* name, const char* overload, const char* new_name, uint16_t key);
}

extern "C" {

// Registers the kernel of an operator, "aten::add" and its overload, at a key also for new_name, at the
// same key and overload. Returns 0; 1 if this torch has not the functions, 2 if it has not the operator.
int cann_host_copy_kernel(const char* name, const char* overload, const char* new_name,
                          uint32_t key) {
  const auto number = static_cast<uint16_t>(key);
  const int code = CopyKernel(
      "_ZN3c1010Dispatcher12registerImplENS_12OperatorNameESt8optionalINS_11DispatchKeyEENS_"
      "14KernelFunctionES2_INS_4impl12CppSignatureEESt10unique_ptrINS_14FunctionSchemaESt14default_"
      "deleteISA_EENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE",
      name, overload, new_name, number);
  return code == 1 ? cann_host::CopyKernelOldAbi(name, overload, new_name, number) : code;
}

}  // extern "C"
