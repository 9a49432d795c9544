// libascendcl: memory, devices, contexts, streams, events, versions, compile options, logs.
// Device memory is host memory and every launch has finished when it returns, so a synchronize has
// nothing to wait for.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "core.h"

using cann_host::Fail;
using cann_host::kBadAlloc;
using cann_host::kInvalidDevice;
using cann_host::kInvalidParam;
using cann_host::kSuccess;

namespace {

constexpr int kContextNull = 107002;  // what aclrtGetDevice says before anybody set a device
constexpr int kDeviceCount = 1;
constexpr size_t kAlignment = 512;  // CANN's own

enum class Where : int { kHost = 0, kDevice = 1, kUnregistered = 2 };  // aclrtMemLocationType

struct Block {
  size_t size;
  Where where;
};

struct Stream {
  int32_t id;
  uint32_t overflow_switch;
};

struct Event {
  std::chrono::steady_clock::time_point time;
  bool recorded;
};

// Leaked on purpose: torch_npu still calls in while the process runs its static destructors.
struct Acl {
  std::mutex mutex;
  std::map<uintptr_t, Block> blocks;
  size_t device_bytes = 0;
  std::map<int, std::string> compile_options;
  std::map<int, int64_t> system_parameters;
  bool initialized = false;
};

Acl& GetAcl() {
  static Acl* acl = new Acl;
  return *acl;
}

std::atomic<int32_t> next_stream_id{0};
thread_local int32_t current_device = -1;
int contexts[kDeviceCount];  // only their addresses matter

int Allocate(void** out, size_t size, Where where) {
  if (out == nullptr || size == 0) return Fail(kInvalidParam, "aclrtMalloc: size %zu", size);
  void* memory = nullptr;
  if (posix_memalign(&memory, kAlignment, (size + kAlignment - 1) / kAlignment * kAlignment) != 0) {
    return Fail(kBadAlloc, "aclrtMalloc: the host has no %zu bytes left", size);
  }
  Acl& acl = GetAcl();
  std::lock_guard<std::mutex> lock(acl.mutex);
  acl.blocks[reinterpret_cast<uintptr_t>(memory)] = {size, where};
  if (where == Where::kDevice) acl.device_bytes += size;
  *out = memory;
  return kSuccess;
}

int Release(void* memory, Where where) {
  Acl& acl = GetAcl();
  {
    std::lock_guard<std::mutex> lock(acl.mutex);
    auto found = acl.blocks.find(reinterpret_cast<uintptr_t>(memory));
    if (found == acl.blocks.end() || found->second.where != where) {
      return Fail(kInvalidParam, "aclrtFree: %p was not allocated here", memory);
    }
    if (where == Where::kDevice) acl.device_bytes -= found->second.size;
    acl.blocks.erase(found);
  }
  std::free(memory);
  return kSuccess;
}

int Copy(void* dst, size_t dst_size, const void* src, size_t count) {
  if (count == 0) return kSuccess;
  if (dst == nullptr || src == nullptr || count > dst_size) {
    return Fail(kInvalidParam, "aclrtMemcpy: %zu bytes from %p into the %zu bytes at %p", count, src,
                dst_size, dst);
  }
  std::memmove(dst, src, count);
  return kSuccess;
}

int Set(void* dst, size_t dst_size, int32_t value, size_t count) {
  if (count == 0) return kSuccess;
  if (dst == nullptr || count > dst_size) {
    return Fail(kInvalidParam, "aclrtMemset: %zu bytes into the %zu bytes at %p", count, dst_size,
                dst);
  }
  std::memset(dst, value, count);
  return kSuccess;
}

int NewStream(void** stream) {
  if (stream == nullptr) return Fail(kInvalidParam, "aclrtCreateStream: no place for the stream");
  *stream = new Stream{next_stream_id++, 0};
  return kSuccess;
}

int NewEvent(void** event) {
  if (event == nullptr) return Fail(kInvalidParam, "aclrtCreateEvent: no place for the event");
  *event = new Event{{}, false};
  return kSuccess;
}

int SetParameter(int option, int64_t value) {
  Acl& acl = GetAcl();
  std::lock_guard<std::mutex> lock(acl.mutex);
  acl.system_parameters[option] = value;
  return kSuccess;
}

int64_t PhysicalBytes(int pages_name) {
  return static_cast<int64_t>(sysconf(pages_name)) * sysconf(_SC_PAGESIZE);
}

bool SocStartsWith(const char* prefix) {
  return std::strncmp(cann_host::SocName(), prefix, std::strlen(prefix)) == 0;
}

}  // namespace

extern "C" {

// ---- life cycle, versions, errors ----

int aclInit(const char*) {
  Acl& acl = GetAcl();
  std::lock_guard<std::mutex> lock(acl.mutex);
  if (acl.initialized) return Fail(100002, "aclInit was called already");
  acl.initialized = true;
  return kSuccess;
}

int aclFinalize() {
  Acl& acl = GetAcl();
  std::lock_guard<std::mutex> lock(acl.mutex);
  acl.initialized = false;
  return kSuccess;
}

const char* aclGetRecentErrMsg() { return cann_host::RecentError(); }

const char* aclrtGetSocName() { return cann_host::SocName(); }

struct aclCANNPackageVersion {
  char version[128];
  char major[64];
  char minor[64];
  char release[64];
  char patch[64];
  char reserved[128];
};

int aclsysGetCANNVersion(int, aclCANNPackageVersion* version) {
  if (version == nullptr) return Fail(kInvalidParam, "aclsysGetCANNVersion: no place for it");
  *version = {};
  std::snprintf(version->version, sizeof(version->version), "%s", cann_host::CannVersion());
  std::sscanf(cann_host::CannVersion(), "%63[0-9].%63[0-9].%63[0-9]", version->major,
              version->minor, version->release);
  return kSuccess;
}

int aclsysGetVersionStr(char*, char* version) {
  std::strcpy(version, cann_host::CannVersion());
  return kSuccess;
}

// ---- devices and contexts ----

int aclrtGetDeviceCount(uint32_t* count) {
  *count = kDeviceCount;
  return kSuccess;
}

int aclrtSetDevice(int32_t device) {
  if (device < 0 || device >= kDeviceCount) {
    return Fail(kInvalidDevice, "aclrtSetDevice: device %d of %d", device, kDeviceCount);
  }
  current_device = device;
  return kSuccess;
}

int aclrtResetDevice(int32_t device) {
  if (device == current_device) current_device = -1;
  return kSuccess;
}

int aclrtGetDevice(int32_t* device) {
  if (current_device < 0) return Fail(kContextNull, "aclrtGetDevice: no device set on this thread");
  *device = current_device;
  return kSuccess;
}

int aclrtGetCurrentContext(void** context) {
  if (current_device < 0) {
    return Fail(kContextNull, "aclrtGetCurrentContext: no device set on this thread");
  }
  *context = &contexts[current_device];
  return kSuccess;
}

int aclrtSetCurrentContext(void* context) {
  for (int i = 0; i < kDeviceCount; ++i) {
    if (context == &contexts[i]) {
      current_device = i;
      return kSuccess;
    }
  }
  return Fail(kInvalidParam, "aclrtSetCurrentContext: unknown context %p", context);
}

int aclrtDeviceCanAccessPeer(int32_t* can_access, int32_t, int32_t) {
  *can_access = 0;
  return kSuccess;
}

// Plausible sizes of such a chip. torch_npu only hands them on; nothing here depends on them.
int aclGetDeviceCapability(uint32_t, int info, int64_t* value) {
  const bool inference = SocStartsWith("Ascend310P");
  switch (info) {
    case 0:
      *value = inference ? 8 : 24;  // matrix cores
      return kSuccess;
    case 1:
      *value = inference ? 8 : 48;  // vector cores
      return kSuccess;
    case 2:
      *value = (inference ? 16LL : 192LL) << 20;  // bytes of L2
      return kSuccess;
    default:
      return Fail(kInvalidParam, "aclGetDeviceCapability: unknown item %d", info);
  }
}

// No limit is set on a stream, so it may use the device's cores: types 0 and 1 are the same there.
int aclrtGetStreamResLimit(void*, int type, uint32_t* value) {
  int64_t cores = 0;
  if (value == nullptr || type < 0 || type > 1) {
    return Fail(kInvalidParam, "aclrtGetStreamResLimit: unknown resource %d", type);
  }
  const int code = aclGetDeviceCapability(0, type, &cores);
  *value = static_cast<uint32_t>(cores);
  return code;
}

int aclrtSynchronizeDevice() { return kSuccess; }
int aclrtSynchronizeDeviceWithTimeout(int32_t) { return kSuccess; }

// Nothing here runs for long enough to time out, and the CPU has no saturation mode: these settings
// have no effect by nature.
int aclrtSetOpExecuteTimeOut(uint32_t) { return kSuccess; }
int aclrtSetOpExecuteTimeOutV2(uint64_t timeout, uint64_t* actual) {
  *actual = timeout;
  return kSuccess;
}
int aclrtSetOpWaitTimeout(uint32_t) { return kSuccess; }
int aclrtSetDeviceSatMode(int) { return kSuccess; }

int aclrtSetSysParamOpt(int option, int64_t value) { return SetParameter(option, value); }
int aclrtCtxSetSysParamOpt(int option, int64_t value) { return SetParameter(option, value); }

int aclrtGetSysParamOpt(int option, int64_t* value) {
  Acl& acl = GetAcl();
  std::lock_guard<std::mutex> lock(acl.mutex);
  auto found = acl.system_parameters.find(option);
  *value = found == acl.system_parameters.end() ? 0 : found->second;
  return kSuccess;
}

// ---- memory ----

int aclrtMalloc(void** out, size_t size, int) { return Allocate(out, size, Where::kDevice); }
int aclrtMallocAlign32(void** out, size_t size, int) { return Allocate(out, size, Where::kDevice); }
int aclrtFree(void* memory) { return Release(memory, Where::kDevice); }
int aclrtMallocHost(void** out, size_t size) { return Allocate(out, size, Where::kHost); }
int aclrtFreeHost(void* memory) { return Release(memory, Where::kHost); }

int aclrtGetMemInfo(int, size_t* free_bytes, size_t* total_bytes) {
  Acl& acl = GetAcl();
  std::lock_guard<std::mutex> lock(acl.mutex);
  const size_t total = PhysicalBytes(_SC_PHYS_PAGES);
  *total_bytes = total;
  *free_bytes = total - std::min(total, acl.device_bytes);
  return kSuccess;
}

struct aclrtPtrAttributes {
  uint32_t device;
  int32_t where;
  uint32_t page_size;
  uint32_t reserved[4];
};

int aclrtPointerGetAttributes(const void* pointer, aclrtPtrAttributes* attributes) {
  *attributes = {0, static_cast<int32_t>(Where::kUnregistered), 4096, {}};
  Acl& acl = GetAcl();
  std::lock_guard<std::mutex> lock(acl.mutex);
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  auto after = acl.blocks.upper_bound(address);
  if (after != acl.blocks.begin()) {
    auto block = std::prev(after);
    if (address < block->first + block->second.size) {
      attributes->where = static_cast<int32_t>(block->second.where);
    }
  }
  return kSuccess;
}

int aclrtMemcpy(void* dst, size_t dst_size, const void* src, size_t count, int) {
  return Copy(dst, dst_size, src, count);
}
int aclrtMemcpyAsync(void* dst, size_t dst_size, const void* src, size_t count, int,
                     void* stream) {
  return cann_host::RunOrCapture(stream, [=] { return Copy(dst, dst_size, src, count); });
}
int aclrtMemset(void* dst, size_t dst_size, int32_t value, size_t count) {
  return Set(dst, dst_size, value, count);
}
int aclrtMemsetAsync(void* dst, size_t dst_size, int32_t value, size_t count, void* stream) {
  return cann_host::RunOrCapture(stream, [=] { return Set(dst, dst_size, value, count); });
}

// ---- streams and events ----

int aclrtCreateStream(void** stream) { return NewStream(stream); }
int aclrtCreateStreamWithConfig(void** stream, uint32_t, uint32_t) { return NewStream(stream); }

int aclrtDestroyStream(void* stream) {
  delete static_cast<Stream*>(stream);
  return kSuccess;
}
int aclrtDestroyStreamForce(void* stream) { return aclrtDestroyStream(stream); }

int aclrtSynchronizeStream(void*) { return kSuccess; }
int aclrtSynchronizeStreamWithTimeout(void*, int32_t) { return kSuccess; }

int aclrtStreamQuery(void*, int* status) {
  *status = 0;  // complete
  return kSuccess;
}

int aclrtStreamGetId(void* stream, int32_t* id) {
  *id = stream == nullptr ? -1 : static_cast<Stream*>(stream)->id;
  return kSuccess;
}

// Launches stop at the first failure anyway.
int aclrtSetStreamFailureMode(void*, uint64_t) { return kSuccess; }

int aclrtSetStreamOverflowSwitch(void* stream, uint32_t flag) {
  if (stream == nullptr) return Fail(kInvalidParam, "aclrtSetStreamOverflowSwitch: no stream");
  static_cast<Stream*>(stream)->overflow_switch = flag;
  return kSuccess;
}

int aclrtGetStreamOverflowSwitch(void* stream, uint32_t* flag) {
  if (stream == nullptr) return Fail(kInvalidParam, "aclrtGetStreamOverflowSwitch: no stream");
  *flag = static_cast<Stream*>(stream)->overflow_switch;
  return kSuccess;
}

int aclrtCreateEventWithFlag(void** event, uint32_t) { return NewEvent(event); }
int aclrtCreateEventExWithFlag(void** event, uint32_t) { return NewEvent(event); }

int aclrtDestroyEvent(void* event) {
  delete static_cast<Event*>(event);
  return kSuccess;
}

int aclrtRecordEvent(void* event, void*) {
  *static_cast<Event*>(event) = {std::chrono::steady_clock::now(), true};
  return kSuccess;
}

int aclrtResetEvent(void* event, void*) {
  static_cast<Event*>(event)->recorded = false;
  return kSuccess;
}

// An event that was never recorded is complete, as in CANN.
int aclrtQueryEventStatus(void*, int* status) {
  *status = 1;  // ACL_EVENT_RECORDED_STATUS_COMPLETE
  return kSuccess;
}

int aclrtQueryEventWaitStatus(void*, int* status) {
  *status = 0;  // ACL_EVENT_WAIT_STATUS_COMPLETE
  return kSuccess;
}

int aclrtSynchronizeEvent(void*) { return kSuccess; }
int aclrtStreamWaitEvent(void*, void*) { return kSuccess; }

int aclrtEventElapsedTime(float* milliseconds, void* start, void* end) {
  const Event* first = static_cast<Event*>(start);
  const Event* last = static_cast<Event*>(end);
  if (!first->recorded || !last->recorded) {
    return Fail(kInvalidParam, "aclrtEventElapsedTime: an event was not recorded");
  }
  *milliseconds = std::chrono::duration<float, std::milli>(last->time - first->time).count();
  return kSuccess;
}

int aclrtEventGetTimestamp(void* event, uint64_t* timestamp) {
  const auto since = static_cast<Event*>(event)->time.time_since_epoch();
  *timestamp = std::chrono::duration_cast<std::chrono::microseconds>(since).count();
  return kSuccess;
}

// ---- compile options ----

int aclSetCompileopt(int option, const char* value) {
  Acl& acl = GetAcl();
  std::lock_guard<std::mutex> lock(acl.mutex);
  acl.compile_options[option] = value;
  return kSuccess;
}

size_t aclGetCompileoptSize(int option) {
  Acl& acl = GetAcl();
  std::lock_guard<std::mutex> lock(acl.mutex);
  return acl.compile_options[option].size() + 1;
}

int aclGetCompileopt(int option, char* value, size_t length) {
  Acl& acl = GetAcl();
  std::lock_guard<std::mutex> lock(acl.mutex);
  const std::string& text = acl.compile_options[option];
  if (length < text.size() + 1) {
    return Fail(kInvalidParam, "aclGetCompileopt: %zu bytes are too few", length);
  }
  std::memcpy(value, text.c_str(), text.size() + 1);
  return kSuccess;
}

// ---- logs, in the manner of CANN: ASCEND_SLOG_PRINT_TO_STDOUT=1, ASCEND_GLOBAL_LOG_LEVEL=0..3 ----

void aclAppLog(int level, const char* function, const char* file, uint32_t line, const char* fmt,
               ...) {
  static const char* print = std::getenv("ASCEND_SLOG_PRINT_TO_STDOUT");
  static const char* wanted = std::getenv("ASCEND_GLOBAL_LOG_LEVEL");
  static const int lowest = wanted == nullptr ? 3 : std::atoi(wanted);
  if (print == nullptr || std::strcmp(print, "1") != 0 || level < lowest) return;
  static const char* const names[] = {"DEBUG", "INFO", "WARNING", "ERROR"};
  char text[2048];
  va_list args;
  va_start(args, fmt);
  std::vsnprintf(text, sizeof(text), fmt, args);
  va_end(args);
  std::printf("[%s] %s:%u %s: %s\n", names[level & 3], file, line, function, text);
}

}  // extern "C"
