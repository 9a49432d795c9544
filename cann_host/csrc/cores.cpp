// libascendcl: how many of the device's cores a device, a stream or a thread may use. The limits are kept
// and reported; the CPU computes without them.
#include <map>

#include "stream.h"

using namespace cann_host;

extern "C" int aclGetDeviceCapability(uint32_t device, int info, int64_t* value);

#define GROUP "Limits of cores"

namespace {

constexpr int kKinds = 2;  // cube and vector cores; the same numbers as aclGetDeviceCapability's

using Limits = std::map<int, uint32_t>;  // by kind

// Leaked: see core.cpp. Guarded by the lock of the streams.
std::map<int, Limits>& of_devices = *new std::map<int, Limits>;

thread_local std::weak_ptr<StreamState> used_by_this_thread;

uint32_t AllCores(int kind) {
  int64_t cores = 0;
  aclGetDeviceCapability(0, kind, &cores);
  return static_cast<uint32_t>(cores);
}

int Check(const char* symbol, int device, int kind, uint32_t value) {
  if (device < 0 || device >= GetOptions().devices) {
    return Fail(kInvalidDevice, "%s: no device %d", symbol, device);
  }
  if (kind < 0 || kind >= kKinds || value == 0 || value > AllCores(kind)) {
    return Fail(kInvalidParam, "%s: %u cores of kind %d; the device has %u", symbol, value, kind,
                kind < 0 || kind >= kKinds ? 0 : AllCores(kind));
  }
  return kSuccess;
}

// The limit of a stream, else of its device, else all cores. The caller holds the lock.
uint32_t LimitOf(const StreamState* stream, int device, int kind) {
  if (stream != nullptr && stream->cores.count(kind)) return stream->cores.at(kind);
  const Limits& limits = of_devices[device];
  return limits.count(kind) ? limits.at(kind) : AllCores(kind);
}

}  // namespace

extern "C" {

int aclrtSetDeviceResLimit(int32_t device, int kind, uint32_t value) {
  CANN_HOST_CALL(aclrtSetDeviceResLimit);
  if (const int code = Check("aclrtSetDeviceResLimit", device, kind, value)) return code;
  const Lock lock(GetStreams().mutex);
  of_devices[device][kind] = value;
  return kSuccess;
}

int aclrtGetDeviceResLimit(int32_t device, int kind, uint32_t* value) {
  CANN_HOST_CALL(aclrtGetDeviceResLimit);
  CANN_HOST_NEEDS(aclrtGetDeviceResLimit, value);
  if (const int code = Check("aclrtGetDeviceResLimit", device, kind, 1)) return code;
  const Lock lock(GetStreams().mutex);
  *value = LimitOf(nullptr, device, kind);
  return kSuccess;
}

int aclrtResetDeviceResLimit(int32_t device) {
  CANN_HOST_CALL(aclrtResetDeviceResLimit);
  if (const int code = Check("aclrtResetDeviceResLimit", device, 0, 1)) return code;
  const Lock lock(GetStreams().mutex);
  of_devices.erase(device);
  return kSuccess;
}

int aclrtSetStreamResLimit(void* handle, int kind, uint32_t value) {
  CANN_HOST_CALL(aclrtSetStreamResLimit);
  if (const int code = Check("aclrtSetStreamResLimit", 0, kind, value)) return code;
  const Lock lock(GetStreams().mutex);
  const auto stream = FindStream(handle);
  if (!stream) return NoStream("aclrtSetStreamResLimit", handle);
  stream->cores[kind] = value;
  return kSuccess;
}

int aclrtGetStreamResLimit(void* handle, int kind, uint32_t* value) {
  CANN_HOST_CALL(aclrtGetStreamResLimit);
  CANN_HOST_NEEDS(aclrtGetStreamResLimit, value);
  if (const int code = Check("aclrtGetStreamResLimit", 0, kind, 1)) return code;
  const Lock lock(GetStreams().mutex);
  const auto stream = FindStream(handle);
  if (!stream) return NoStream("aclrtGetStreamResLimit", handle);
  *value = LimitOf(stream.get(), stream->device, kind);
  return kSuccess;
}

int aclrtResetStreamResLimit(void* handle) {
  CANN_HOST_CALL(aclrtResetStreamResLimit);
  const Lock lock(GetStreams().mutex);
  const auto stream = FindStream(handle);
  if (!stream) return NoStream("aclrtResetStreamResLimit", handle);
  stream->cores.clear();
  return kSuccess;
}

int aclrtUseStreamResInCurrentThread(void* handle) {
  CANN_HOST_CALL(aclrtUseStreamResInCurrentThread);
  const Lock lock(GetStreams().mutex);
  const auto stream = FindStream(handle);
  if (!stream) return NoStream("aclrtUseStreamResInCurrentThread", handle);
  used_by_this_thread = stream;
  return kSuccess;
}

int aclrtUnuseStreamResInCurrentThread(void* handle) {
  CANN_HOST_CALL(aclrtUnuseStreamResInCurrentThread);
  const Lock lock(GetStreams().mutex);
  if (!FindStream(handle)) return NoStream("aclrtUnuseStreamResInCurrentThread", handle);
  used_by_this_thread.reset();
  return kSuccess;
}

int aclrtGetResInCurrentThread(int kind, uint32_t* value) {
  CANN_HOST_CALL(aclrtGetResInCurrentThread);
  CANN_HOST_NEEDS(aclrtGetResInCurrentThread, value);
  if (const int code = Check("aclrtGetResInCurrentThread", 0, kind, 1)) return code;
  const Lock lock(GetStreams().mutex);
  *value = LimitOf(used_by_this_thread.lock().get(), CurrentDevice(), kind);
  return kSuccess;
}

}  // extern "C"
