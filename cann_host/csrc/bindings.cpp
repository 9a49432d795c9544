// What Python asks a library before it uses it: which sources it was built from, and how large the
// structs are that both read.
#include "bindings.h"

#include <string>

// The digest of the sources, as CMakeLists.txt computes it: _native.py takes no library of others.
const char* cann_host_sources() { return CANN_HOST_SOURCES; }

// For a library without its sources beside it, in a wheel: bindings.py compares the sizes.
const char* cann_host_struct_sizes() {
  static const std::string* sizes = new std::string(
      "cann_host_ge_tensor " + std::to_string(sizeof(cann_host_ge_tensor)) + "\n");
  return sizes->c_str();
}
