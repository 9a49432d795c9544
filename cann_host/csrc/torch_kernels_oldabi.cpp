// torch 2.6 has the strings of the C++ ABI from before GCC 5.
#define _GLIBCXX_USE_CXX11_ABI 0
#include "torch_kernels.h"

namespace cann_host {
int CopyKernelOldAbi(const char* name, const char* overload, const char* new_name, uint16_t key) {
  return CopyKernel(
      "_ZN3c1010Dispatcher12registerImplENS_12OperatorNameESt8optionalINS_11DispatchKeyEENS_"
      "14KernelFunctionES2_INS_4impl12CppSignatureEESt10unique_ptrINS_14FunctionSchemaESt14default_"
      "deleteISA_EESs",
      name, overload, new_name, key);
}
}  // namespace cann_host
