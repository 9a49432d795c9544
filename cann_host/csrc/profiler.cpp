// libmspti, through which torch.profiler collects what ran: operators and graphs, with the time the
// CPU took for them. And the hooks of the older profiler: none runs here, a registered callback is
// never called, and a report is refused by name.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "core.h"

namespace {

constexpr int kKernels = 2;          // MSPTI_ACTIVITY_KIND_KERNEL
constexpr int kInvalidParameter = 1;  // MSPTI_ERROR_INVALID_PARAMETER
constexpr int kQueueEmpty = 5;        // MSPTI_ERROR_QUEUE_EMPTY
constexpr const char* kType = "cann_host, on the CPU";

// As in mspti_activity.h.
struct __attribute__((packed, aligned(8))) KernelRecord {
  int32_t kind;
  uint64_t start;
  uint64_t end;
  uint32_t device;
  uint32_t stream;
  uint64_t correlation;
  const char* type;
  const char* name;
};

using RequestBuffer = void (*)(uint8_t** buffer, size_t* size, size_t* most_records);
using CompleteBuffer = void (*)(uint8_t* buffer, size_t size, size_t valid_size);

// Leaked: see core.cpp.
struct Profiler {
  std::mutex mutex;
  std::vector<KernelRecord> records;
  RequestBuffer request = nullptr;
  CompleteBuffer complete = nullptr;
  uint64_t correlation = 0;
};

Profiler& GetProfiler() {
  static Profiler* profiler = new Profiler;
  return *profiler;
}

std::atomic<bool> is_profiling{false};

}  // namespace

bool cann_host::IsProfiling() { return is_profiling.load(std::memory_order_relaxed); }

int64_t cann_host::NowNs() {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

void cann_host::Profile(const char* op, void* stream, int64_t start_ns, int64_t end_ns) {
  const auto id = static_cast<uint32_t>(StreamId(stream));
  Profiler& profiler = GetProfiler();
  std::lock_guard<std::mutex> lock(profiler.mutex);
  profiler.records.push_back({kKernels, static_cast<uint64_t>(start_ns),
                              static_cast<uint64_t>(end_ns),
                              static_cast<uint32_t>(CurrentDevice()), id, ++profiler.correlation,
                              kType, op});
}

extern "C" {

#define GROUP "Profiler"

int msptiSubscribe(void** subscriber, void*, void*) {
  CANN_HOST_CALL(msptiSubscribe);
  *subscriber = &GetProfiler();
  return cann_host::kSuccess;
}

int msptiUnsubscribe(void*) {
  CANN_HOST_CALL(msptiUnsubscribe);
  is_profiling = false;
  return cann_host::kSuccess;
}

int msptiActivityRegisterCallbacks(RequestBuffer request, CompleteBuffer complete) {
  CANN_HOST_CALL(msptiActivityRegisterCallbacks);
  if (request == nullptr || complete == nullptr) {
    return cann_host::Fail(kInvalidParameter, "msptiActivityRegisterCallbacks: no callback");
  }
  Profiler& profiler = GetProfiler();
  std::lock_guard<std::mutex> lock(profiler.mutex);
  profiler.request = request;
  profiler.complete = complete;
  return cann_host::kSuccess;
}

// Kernels are recorded; the other kinds may be asked for, and there are none of them.
int msptiActivityEnable(int kind) {
  CANN_HOST_CALL(msptiActivityEnable);
  if (kind == kKernels) is_profiling = true;
  return cann_host::kSuccess;
}

int msptiActivityDisable(int kind) {
  CANN_HOST_CALL(msptiActivityDisable);
  if (kind == kKernels) is_profiling = false;
  return cann_host::kSuccess;
}

CANN_HOST_ENTRY(msptiActivityIsEnabled, "makes")
bool msptiActivityIsEnabled(int kind) { return kind == kKernels && is_profiling; }

int msptiActivityFlushAll(uint32_t) {
  CANN_HOST_CALL(msptiActivityFlushAll);
  Profiler& profiler = GetProfiler();
  std::vector<KernelRecord> records;
  RequestBuffer request = nullptr;
  CompleteBuffer complete = nullptr;
  {
    std::lock_guard<std::mutex> lock(profiler.mutex);
    if (profiler.request == nullptr) return cann_host::kSuccess;
    records = std::exchange(profiler.records, {});
    request = profiler.request;
    complete = profiler.complete;
  }
  for (size_t done = 0; done < records.size();) {
    uint8_t* buffer = nullptr;
    size_t size = 0, most = 0;
    request(&buffer, &size, &most);
    size_t count = std::min(size / sizeof(KernelRecord), records.size() - done);
    if (most != 0) count = std::min(count, most);
    if (buffer == nullptr || count == 0) {
      return cann_host::Fail(kInvalidParameter, "msptiActivityFlushAll: the buffer has %zu bytes",
                             size);
    }
    std::memcpy(buffer, &records[done], count * sizeof(KernelRecord));
    complete(buffer, size, count * sizeof(KernelRecord));
    done += count;
  }
  return cann_host::kSuccess;
}

// `record` is the last one, or null for the first.
int msptiActivityGetNextRecord(uint8_t* buffer, size_t valid_size, uint8_t** record) {
  CANN_HOST_CALL(msptiActivityGetNextRecord);
  if (buffer == nullptr || record == nullptr) {
    return cann_host::Fail(kInvalidParameter, "msptiActivityGetNextRecord: an argument is null");
  }
  uint8_t* next = *record == nullptr ? buffer : *record + sizeof(KernelRecord);
  if (next < buffer || next + sizeof(KernelRecord) > buffer + valid_size) return kQueueEmpty;
  *record = next;
  return cann_host::kSuccess;
}

// Who launched a kernel is not kept: the trace shows it beside the call, without an arrow.
CANN_HOST_ENTRY(msptiActivityPushExternalCorrelationId, "fails")
int msptiActivityPushExternalCorrelationId(int, uint64_t) {
  return cann_host::Unimplemented("msptiActivityPushExternalCorrelationId");
}
CANN_HOST_ENTRY(msptiActivityPopExternalCorrelationId, "fails")
int msptiActivityPopExternalCorrelationId(int, uint64_t*) {
  return cann_host::Unimplemented("msptiActivityPopExternalCorrelationId");
}

int32_t MsprofRegisterCallback(uint32_t, void*) {
  CANN_HOST_CALL(MsprofRegisterCallback);
  return cann_host::kSuccess;
}

CANN_HOST_ENTRY(MsprofGetHashId, "makes")
uint64_t MsprofGetHashId(const char* text, size_t length) {
  return std::hash<std::string>{}(std::string(text, length));
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
