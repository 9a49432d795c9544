// What Python checks before it uses a library: the digest of the sources that it was built from, and
// the sizes of the structs that both read.
#include "bindings.h"

#include <string>

// The digest of the sources, as CMakeLists.txt computes it: _native.py refuses a library of others.
const char* cann_host_sources() { return CANN_HOST_SOURCES; }

// For a library without its sources beside it, in a wheel: bindings.py compares the sizes.
const char* cann_host_struct_sizes() {
  static const std::string* sizes =
      new std::string("cann_host_ge_tensor " + std::to_string(sizeof(cann_host_ge_tensor)) + "\n");
  return sizes->c_str();
}
