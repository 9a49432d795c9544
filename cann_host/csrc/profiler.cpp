// The profiler's hooks. No profiler runs here: a registered callback is never called, and a report is
// refused by name. torch.profiler needs libmspti to be there, finds no installed CANN, and collects what
// the host does; the functions of libmspti are in unimplemented.cpp.
#include <chrono>
#include <cstdint>
#include <functional>
#include <string_view>

#include "core.h"

#define GROUP "Profiler"

extern "C" {

int32_t MsprofRegisterCallback(uint32_t, void*) {
  CANN_HOST_CALL(MsprofRegisterCallback);
  return cann_host::kSuccess;
}

CANN_HOST_ENTRY(MsprofGetHashId, "makes")
uint64_t MsprofGetHashId(const char* text, size_t length) {
  return text == nullptr ? 0 : std::hash<std::string_view>{}({text, length});
}

CANN_HOST_ENTRY(MsprofSysCycleTime, "makes")
uint64_t MsprofSysCycleTime() {
  return std::chrono::steady_clock::now().time_since_epoch().count();
}

CANN_HOST_ENTRY(MsprofReportApi, "fails")
int32_t MsprofReportApi(uint32_t, const void*) {
  return cann_host::Unimplemented("MsprofReportApi");
}

CANN_HOST_ENTRY(MsprofReportCompactInfo, "fails")
int32_t MsprofReportCompactInfo(uint32_t, const void*, uint32_t) {
  return cann_host::Unimplemented("MsprofReportCompactInfo");
}

CANN_HOST_ENTRY(MsprofReportAdditionalInfo, "fails")
int32_t MsprofReportAdditionalInfo(uint32_t, const void*, uint32_t) {
  return cann_host::Unimplemented("MsprofReportAdditionalInfo");
}

}  // extern "C"
