// The profiler's hooks. No profiler ever runs here: a registered callback is never called, and a
// report is refused by name.
#include <chrono>
#include <cstdint>
#include <functional>
#include <string>

#include "core.h"

extern "C" {

int32_t MsprofRegisterCallback(uint32_t, void*) { return cann_host::kSuccess; }

uint64_t MsprofGetHashId(const char* text, size_t length) {
  return std::hash<std::string>{}(std::string(text, length));
}

uint64_t MsprofSysCycleTime() {
  return std::chrono::steady_clock::now().time_since_epoch().count();
}

int32_t MsprofReportApi(uint32_t, const void*) {
  return cann_host::Unimplemented("MsprofReportApi");
}

int32_t MsprofReportCompactInfo(uint32_t, const void*, uint32_t) {
  return cann_host::Unimplemented("MsprofReportCompactInfo");
}

int32_t MsprofReportAdditionalInfo(uint32_t, const void*, uint32_t) {
  return cann_host::Unimplemented("MsprofReportAdditionalInfo");
}

}  // extern "C"
