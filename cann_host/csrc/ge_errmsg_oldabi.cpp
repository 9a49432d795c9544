// GE still returns this one std::string by the C++ ABI from before GCC 5, so it has a file, and a
// macro, of its own.
#define _GLIBCXX_USE_CXX11_ABI 0
#include <string>

namespace cann_host {
const char* RecentError();
}

namespace ge {
std::string GEGetErrorMsg() { return cann_host::RecentError(); }
}  // namespace ge
