// libascendcl: life cycle, versions, devices and contexts, compile options, logs.
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "core.h"

using cann_host::Fail;
using cann_host::GetOptions;
using cann_host::kContextNull;
using cann_host::kInvalidDevice;
using cann_host::kInvalidParam;
using cann_host::kSuccess;

namespace {

constexpr int kMostDevices = 64;

std::atomic<bool> was_set[kMostDevices];  // by some thread, since its last reset

// Leaked on purpose: torch_npu still calls in while the process runs its static destructors.
struct Acl {
  cann_host::Mutex mutex;
  std::map<int, std::string> compile_options;
  std::map<int, int64_t> system_parameters;
  bool initialized = false;
};

Acl& GetAcl() {
  static Acl* acl = new Acl;
  return *acl;
}
[[maybe_unused]] Acl& made = GetAcl();

thread_local int32_t current_device = -1;
int contexts[kMostDevices];  // only their addresses matter

int SetParameter(int option, int64_t value) {
  Acl& acl = GetAcl();
  const cann_host::Lock lock(acl.mutex);
  acl.system_parameters[option] = value;
  return kSuccess;
}

}  // namespace

int cann_host::CurrentDevice() { return current_device < 0 ? 0 : current_device; }

extern "C" {

#define GROUP "Life cycle and versions"

int aclInit(const char*) {
  CANN_HOST_CALL(aclInit);
  Acl& acl = GetAcl();
  const cann_host::Lock lock(acl.mutex);
  if (acl.initialized) return Fail(100002, "aclInit was called already");
  acl.initialized = true;
  return kSuccess;
}

int aclFinalize() {
  CANN_HOST_CALL(aclFinalize);
  Acl& acl = GetAcl();
  const cann_host::Lock lock(acl.mutex);
  acl.initialized = false;
  return kSuccess;
}

CANN_HOST_ENTRY(aclGetRecentErrMsg, "makes")
const char* aclGetRecentErrMsg() { return cann_host::RecentError(); }

CANN_HOST_ENTRY(aclrtGetSocName, "makes")
const char* aclrtGetSocName() { return GetOptions().soc.c_str(); }

struct aclCANNPackageVersion {
  char version[128];
  char major[64];
  char minor[64];
  char release[64];
  char patch[64];
  char reserved[128];
};

int aclsysGetCANNVersion(int, aclCANNPackageVersion* version) {
  CANN_HOST_CALL(aclsysGetCANNVersion);
  if (version == nullptr) return Fail(kInvalidParam, "aclsysGetCANNVersion: no place for it");
  const char* text = GetOptions().cann_version.c_str();
  *version = {};
  std::snprintf(version->version, sizeof(version->version), "%s", text);
  std::sscanf(text, "%63[0-9].%63[0-9].%63[^.].%63s", version->major, version->minor,
              version->release, version->patch);
  return kSuccess;
}

// The buffer has 128 bytes; Python refuses a longer version.
int aclsysGetVersionStr(char*, char* version) {
  CANN_HOST_CALL(aclsysGetVersionStr);
  CANN_HOST_NEEDS(aclsysGetVersionStr, version);
  std::strcpy(version, GetOptions().cann_version.c_str());
  return kSuccess;
}

#undef GROUP
#define GROUP "Devices and contexts"

int aclrtGetDeviceCount(uint32_t* count) {
  CANN_HOST_CALL(aclrtGetDeviceCount);
  CANN_HOST_NEEDS(aclrtGetDeviceCount, count);
  *count = GetOptions().devices;
  return kSuccess;
}

int aclrtSetDevice(int32_t device) {
  CANN_HOST_CALL(aclrtSetDevice);
  if (device < 0 || device >= GetOptions().devices) {
    return Fail(kInvalidDevice, "aclrtSetDevice: there is no device %d; cann_host has %d", device,
                GetOptions().devices);
  }
  current_device = device;
  was_set[device] = true;
  return kSuccess;
}

// Whether a device has a context: torch_npu asks before it makes one. A caller that wants only one of
// the two passes null for the other.
int aclrtGetPrimaryCtxState(int32_t device, uint32_t* flags, int32_t* active) {
  CANN_HOST_CALL(aclrtGetPrimaryCtxState);
  if (device < 0 || device >= GetOptions().devices) {
    return Fail(kInvalidDevice, "aclrtGetPrimaryCtxState: there is no device %d; cann_host has %d",
                device, GetOptions().devices);
  }
  if (flags != nullptr) *flags = 0;
  if (active != nullptr) *active = was_set[device] ? 1 : 0;
  return kSuccess;
}

int aclrtResetDevice(int32_t device) {
  CANN_HOST_CALL(aclrtResetDevice);
  cann_host::DoAllWork();
  if (device == current_device) current_device = -1;
  if (device >= 0 && device < kMostDevices) was_set[device] = false;
  return kSuccess;
}

int aclrtGetDevice(int32_t* device) {
  CANN_HOST_CALL(aclrtGetDevice);
  CANN_HOST_NEEDS(aclrtGetDevice, device);
  if (current_device < 0) return Fail(kContextNull, "aclrtGetDevice: no device set on this thread");
  *device = current_device;
  return kSuccess;
}

int aclrtGetCurrentContext(void** context) {
  CANN_HOST_CALL(aclrtGetCurrentContext);
  CANN_HOST_NEEDS(aclrtGetCurrentContext, context);
  if (current_device < 0) {
    return Fail(kContextNull, "aclrtGetCurrentContext: no device set on this thread");
  }
  *context = &contexts[current_device];
  return kSuccess;
}

int aclrtSetCurrentContext(void* context) {
  CANN_HOST_CALL(aclrtSetCurrentContext);
  for (int i = 0; i < GetOptions().devices; ++i) {
    if (context == &contexts[i]) {
      current_device = i;
      return kSuccess;
    }
  }
  return Fail(kInvalidParam, "aclrtSetCurrentContext: unknown context %p", context);
}

// Plausible sizes of such a chip. torch_npu only passes them on; nothing here depends on them.
int aclGetDeviceCapability(uint32_t, int info, int64_t* value) {
  CANN_HOST_CALL(aclGetDeviceCapability);
  CANN_HOST_NEEDS(aclGetDeviceCapability, value);
  const bool inference = GetOptions().soc.rfind("Ascend310P", 0) == 0;
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

// Nothing here times out, and the CPU has no saturation mode: these settings have no effect.
int aclrtSetOpExecuteTimeOut(uint32_t) {
  CANN_HOST_CALL(aclrtSetOpExecuteTimeOut);
  return kSuccess;
}
int aclrtSetOpExecuteTimeOutV2(uint64_t timeout, uint64_t* actual) {
  CANN_HOST_CALL(aclrtSetOpExecuteTimeOutV2);
  CANN_HOST_NEEDS(aclrtSetOpExecuteTimeOutV2, actual);
  *actual = timeout;
  return kSuccess;
}
int aclrtSetOpWaitTimeout(uint32_t) {
  CANN_HOST_CALL(aclrtSetOpWaitTimeout);
  return kSuccess;
}
int aclrtSetDeviceSatMode(int) {
  CANN_HOST_CALL(aclrtSetDeviceSatMode);
  return kSuccess;
}

int aclrtSetSysParamOpt(int option, int64_t value) {
  CANN_HOST_CALL(aclrtSetSysParamOpt);
  return SetParameter(option, value);
}
int aclrtCtxSetSysParamOpt(int option, int64_t value) {
  CANN_HOST_CALL(aclrtCtxSetSysParamOpt);
  return SetParameter(option, value);
}

int aclrtGetSysParamOpt(int option, int64_t* value) {
  CANN_HOST_CALL(aclrtGetSysParamOpt);
  CANN_HOST_NEEDS(aclrtGetSysParamOpt, value);
  Acl& acl = GetAcl();
  const cann_host::Lock lock(acl.mutex);
  auto found = acl.system_parameters.find(option);
  *value = found == acl.system_parameters.end() ? 0 : found->second;
  return kSuccess;
}

#undef GROUP
#define GROUP "Compile options and logs"

int aclSetCompileopt(int option, const char* value) {
  CANN_HOST_CALL(aclSetCompileopt);
  CANN_HOST_NEEDS(aclSetCompileopt, value);
  Acl& acl = GetAcl();
  const cann_host::Lock lock(acl.mutex);
  acl.compile_options[option] = value;
  return kSuccess;
}

CANN_HOST_ENTRY(aclGetCompileoptSize, "makes")
size_t aclGetCompileoptSize(int option) {
  Acl& acl = GetAcl();
  const cann_host::Lock lock(acl.mutex);
  return acl.compile_options[option].size() + 1;
}

int aclGetCompileopt(int option, char* value, size_t length) {
  CANN_HOST_CALL(aclGetCompileopt);
  CANN_HOST_NEEDS(aclGetCompileopt, value);
  Acl& acl = GetAcl();
  const cann_host::Lock lock(acl.mutex);
  const std::string& text = acl.compile_options[option];
  if (length < text.size() + 1) {
    return Fail(kInvalidParam, "aclGetCompileopt: %zu bytes are too few", length);
  }
  std::memcpy(value, text.c_str(), text.size() + 1);
  return kSuccess;
}

// The same variables as in CANN: ASCEND_SLOG_PRINT_TO_STDOUT=1, ASCEND_GLOBAL_LOG_LEVEL=0..3.
CANN_HOST_ENTRY(aclAppLog, "makes")
void aclAppLog(int level, const char* function, const char* file, uint32_t line, const char* fmt,
               ...) {
  static const char* print = std::getenv("ASCEND_SLOG_PRINT_TO_STDOUT");
  static const char* wanted = std::getenv("ASCEND_GLOBAL_LOG_LEVEL");
  static const int lowest = wanted == nullptr ? 3 : std::atoi(wanted);
  if (print == nullptr || std::strcmp(print, "1") != 0 || level < lowest || fmt == nullptr) return;
  static const char* const names[] = {"DEBUG", "INFO", "WARNING", "ERROR"};
  char text[2048];
  va_list args;
  va_start(args, fmt);
  std::vsnprintf(text, sizeof(text), fmt, args);
  va_end(args);
  std::printf("[%s] %s:%u %s: %s\n", names[level & 3], file ? file : "", line,
              function ? function : "", text);
}

}  // extern "C"
