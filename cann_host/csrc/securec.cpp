// The bounded string functions that CANN's libraries export. 0 or a length is success, -1 or a
// positive code is failure, and the destination is emptied on failure.
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "core.h"

#define GROUP "Bounded strings"
CANN_HOST_ENTRY(vsnprintf_s, "makes")
CANN_HOST_ENTRY(snprintf_s, "makes")
CANN_HOST_ENTRY(strcpy_s, "makes")

extern "C" {

int vsnprintf_s(char* dst, size_t size, size_t count, const char* fmt, va_list args) {
  if (dst == nullptr || size == 0 || fmt == nullptr) return -1;
  const int length = std::vsnprintf(dst, count < size ? count + 1 : size, fmt, args);
  if (length < 0 || (static_cast<size_t>(length) >= size && count >= size)) {
    dst[0] = '\0';
    return -1;
  }
  // Cut at count characters: the text stays, and the return value reports the cut.
  return static_cast<size_t>(length) > count ? -1 : length;
}

int snprintf_s(char* dst, size_t size, size_t count, const char* fmt, ...) {
  va_list args;
  va_start(args, fmt);
  const int result = vsnprintf_s(dst, size, count, fmt, args);
  va_end(args);
  return result;
}

int strcpy_s(char* dst, size_t size, const char* src) {
  if (dst == nullptr || size == 0) return 22;  // EINVAL
  if (src == nullptr || std::strlen(src) >= size) {
    dst[0] = '\0';
    return src == nullptr ? 22 : 34;  // ERANGE
  }
  std::memcpy(dst, src, std::strlen(src) + 1);
  return 0;
}

}  // extern "C"
