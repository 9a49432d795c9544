// GE still returns this one std::string with the C++ ABI from before GCC 5, so it has its own file and
// macro.
#define _GLIBCXX_USE_CXX11_ABI 0
#include <string>

namespace cann_host {
const char* RecentError();
}

namespace ge {
std::string GEGetErrorMsg() { return cann_host::RecentError(); }
}  // namespace ge
