// libascendcl: memory. Device memory is host memory, counted for each device against its limit.
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "core.h"

using cann_host::DeviceBytes;
using cann_host::Fail;
using cann_host::GetOptions;
using cann_host::kInvalidParam;
using cann_host::kOutOfMemory;
using cann_host::kSuccess;

#define GROUP "Memory"

namespace {

constexpr size_t kAlignment = 512;  // CANN's own

enum class Where : int { kHost = 0, kDevice = 1, kUnregistered = 2 };  // aclrtMemLocationType

struct Block {
  size_t size;
  Where where;
  int device;
};

// Leaked on purpose: torch_npu still calls in while the process runs its static destructors.
struct Memory {
  std::mutex mutex;
  std::map<uintptr_t, Block> blocks;
  std::map<int, size_t> used;  // bytes of each device
};

Memory& GetMemory() {
  static Memory* memory = new Memory;
  return *memory;
}

int Allocate(const char* symbol, void** out, size_t size, Where where) {
  if (out == nullptr || size == 0) return Fail(kInvalidParam, "%s: size %zu", symbol, size);
  const int device = cann_host::CurrentDevice();
  Memory& memory = GetMemory();
  std::lock_guard<std::mutex> lock(memory.mutex);
  size_t& used = memory.used[device];
  if (where == Where::kDevice && size > DeviceBytes() - used) {
    return Fail(kOutOfMemory,
                "%s: %zu bytes do not fit: device %d has %zu bytes, %zu of them in use (cann_host; "
                "CANN_HOST_MEMORY sets the size)",
                symbol, size, device, DeviceBytes(), used);
  }
  void* bytes = nullptr;
  if (size > SIZE_MAX - kAlignment || posix_memalign(&bytes, kAlignment, size) != 0) {
    return Fail(kOutOfMemory, "%s: the host has no %zu bytes left", symbol, size);
  }
  memory.blocks[reinterpret_cast<uintptr_t>(bytes)] = {size, where, device};
  if (where == Where::kDevice) used += size;
  *out = bytes;
  return kSuccess;
}

int Release(const char* symbol, void* bytes, Where where) {
  cann_host::DoAllWork();  // some of it may be with this memory
  Memory& memory = GetMemory();
  {
    std::lock_guard<std::mutex> lock(memory.mutex);
    const auto found = memory.blocks.find(reinterpret_cast<uintptr_t>(bytes));
    if (found == memory.blocks.end() || found->second.where != where) {
      return Fail(kInvalidParam, "%s: %p was not allocated here", symbol, bytes);
    }
    if (where == Where::kDevice) memory.used[found->second.device] -= found->second.size;
    memory.blocks.erase(found);
  }
  std::free(bytes);
  return kSuccess;
}

// The block an address is in, with its begin; null if in none. Wants the lock.
const std::pair<const uintptr_t, Block>* Find(const void* address) {
  const auto& blocks = GetMemory().blocks;
  const auto at = reinterpret_cast<uintptr_t>(address);
  const auto after = blocks.upper_bound(at);
  if (after == blocks.begin()) return nullptr;
  const auto& block = *std::prev(after);
  return at - block.first < block.second.size ? &block : nullptr;
}

// Whether a copy or set may touch the memory; the kinds are those of aclrtMemcpyKind.
constexpr int kToDevice = 1, kToHost = 2, kInDevice = 3;

int CheckCopy(const char* symbol, const void* dst, size_t dst_size, const void* src, size_t count,
              int kind) {
  const bool to_device = kind == kToDevice || kind == kInDevice;
  const bool from_device = kind == kToHost || kind == kInDevice;
  if (dst == nullptr || src == nullptr || count > dst_size ||
      (to_device && !cann_host::IsAllocated(dst, count)) ||
      (from_device && !cann_host::IsAllocated(src, count))) {
    return Fail(kInvalidParam,
                "%s: %zu bytes of %p do not fit into the %zu bytes at %p, or are not all in memory "
                "that was allocated here",
                symbol, count, src, dst_size, dst);
  }
  return kSuccess;
}

int CheckSet(const char* symbol, const void* dst, size_t dst_size, size_t count) {
  if (count > dst_size || !cann_host::IsAllocated(dst, count)) {
    return Fail(kInvalidParam,
                "%s: %zu bytes do not fit into the %zu bytes at %p, or are not all in memory that "
                "was allocated here",
                symbol, count, dst_size, dst);
  }
  return kSuccess;
}

}  // namespace

namespace cann_host {

size_t DeviceBytes() {
  if (GetOptions().memory != 0) return GetOptions().memory;
  return static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE) /
         GetOptions().devices;
}

void* AllocateDevice(size_t bytes) {
  void* memory = nullptr;
  Allocate("GE", &memory, bytes, Where::kDevice);
  return memory;
}

void FreeDevice(void* memory) { Release("GE", memory, Where::kDevice); }

size_t BytesAt(const void* address) {
  std::lock_guard<std::mutex> lock(GetMemory().mutex);
  const auto* block = Find(address);
  if (block == nullptr) return 0;
  return block->second.size - (reinterpret_cast<uintptr_t>(address) - block->first);
}

}  // namespace cann_host

extern "C" {

int aclrtMalloc(void** out, size_t size, int) {
  CANN_HOST_CALL(aclrtMalloc);
  return Allocate("aclrtMalloc", out, size, Where::kDevice);
}
int aclrtMallocAlign32(void** out, size_t size, int) {
  CANN_HOST_CALL(aclrtMallocAlign32);
  return Allocate("aclrtMallocAlign32", out, size, Where::kDevice);
}
int aclrtFree(void* memory) {
  CANN_HOST_CALL(aclrtFree);
  return Release("aclrtFree", memory, Where::kDevice);
}
int aclrtMallocHost(void** out, size_t size) {
  CANN_HOST_CALL(aclrtMallocHost);
  return Allocate("aclrtMallocHost", out, size, Where::kHost);
}
int aclrtFreeHost(void* memory) {
  CANN_HOST_CALL(aclrtFreeHost);
  return Release("aclrtFreeHost", memory, Where::kHost);
}

int aclrtGetMemInfo(int, size_t* free_bytes, size_t* total_bytes) {
  CANN_HOST_CALL(aclrtGetMemInfo);
  CANN_HOST_NEEDS(aclrtGetMemInfo, free_bytes);
  CANN_HOST_NEEDS(aclrtGetMemInfo, total_bytes);
  const int device = cann_host::CurrentDevice();
  Memory& memory = GetMemory();
  std::lock_guard<std::mutex> lock(memory.mutex);
  *total_bytes = DeviceBytes();
  *free_bytes = DeviceBytes() - memory.used[device];
  return kSuccess;
}

struct aclrtPtrAttributes {
  uint32_t device;
  int32_t where;
  uint32_t page_size;
  uint32_t reserved[4];
};

int aclrtPointerGetAttributes(const void* pointer, aclrtPtrAttributes* attributes) {
  CANN_HOST_CALL(aclrtPointerGetAttributes);
  CANN_HOST_NEEDS(aclrtPointerGetAttributes, attributes);
  *attributes = {0, static_cast<int32_t>(Where::kUnregistered), 4096, {}};
  std::lock_guard<std::mutex> lock(GetMemory().mutex);
  if (const auto* block = Find(pointer)) {
    attributes->where = static_cast<int32_t>(block->second.where);
    attributes->device = block->second.device;
  }
  return kSuccess;
}

int aclrtMemcpy(void* dst, size_t dst_size, const void* src, size_t count, int kind) {
  CANN_HOST_CALL(aclrtMemcpy);
  if (count == 0) return kSuccess;
  if (const int code = CheckCopy("aclrtMemcpy", dst, dst_size, src, count, kind)) return code;
  std::memmove(dst, src, count);
  return kSuccess;
}
int aclrtMemcpyAsync(void* dst, size_t dst_size, const void* src, size_t count, int kind,
                     void* stream) {
  CANN_HOST_CALL(aclrtMemcpyAsync);
  if (count == 0) return kSuccess;
  if (const int code = CheckCopy("aclrtMemcpyAsync", dst, dst_size, src, count, kind)) return code;
  // The caller may take back ordinary host memory as soon as the call returns; only memory from
  // aclrtMallocHost stays until its work is done.
  std::shared_ptr<std::vector<char>> staged;
  if (cann_host::IsDeferring() && kind == kToDevice && !cann_host::IsAllocated(src, count)) {
    const char* bytes = static_cast<const char*>(src);
    staged = std::make_shared<std::vector<char>>(bytes, bytes + count);
    src = staged->data();
  }
  // What is ours now, pinned memory included, must be so when it is done, perhaps as part of a replay.
  const bool ours_from = cann_host::IsAllocated(src, count);
  const bool ours_to = cann_host::IsAllocated(dst, count);
  const int code = cann_host::OnStream("aclrtMemcpyAsync", stream, [=] {
    (void)staged;
    if ((ours_from && !cann_host::IsAllocated(src, count)) ||
        (ours_to && !cann_host::IsAllocated(dst, count))) {
      return Fail(kInvalidParam, "aclrtMemcpyAsync: %zu bytes at %p or %p are no longer allocated",
                  count, src, dst);
    }
    std::memmove(dst, src, count);
    return +kSuccess;
  });
  if (code == kSuccess && cann_host::IsDeferring() && kind == kToHost &&
      !cann_host::IsAllocated(dst, count)) {
    return cann_host::FinishStream("aclrtMemcpyAsync", stream);
  }
  return code;
}
int aclrtMemset(void* dst, size_t dst_size, int32_t value, size_t count) {
  CANN_HOST_CALL(aclrtMemset);
  if (count == 0) return kSuccess;
  if (const int code = CheckSet("aclrtMemset", dst, dst_size, count)) return code;
  std::memset(dst, value, count);
  return kSuccess;
}
int aclrtMemsetAsync(void* dst, size_t dst_size, int32_t value, size_t count, void* stream) {
  CANN_HOST_CALL(aclrtMemsetAsync);
  if (count == 0) return kSuccess;
  if (const int code = CheckSet("aclrtMemsetAsync", dst, dst_size, count)) return code;
  return cann_host::OnStream("aclrtMemsetAsync", stream, [=] {
    if (const int code = CheckSet("aclrtMemsetAsync", dst, dst_size, count)) return code;
    std::memset(dst, value, count);
    return +kSuccess;
  });
}

uint64_t cann_host_bytes_at(const void* address) { return cann_host::BytesAt(address); }

// All memory is the host's, so every device reaches every other's.
int aclrtDeviceCanAccessPeer(int32_t* can_access, int32_t, int32_t) {
  CANN_HOST_CALL(aclrtDeviceCanAccessPeer);
  CANN_HOST_NEEDS(aclrtDeviceCanAccessPeer, can_access);
  *can_access = 1;
  return kSuccess;
}
int aclrtDeviceEnablePeerAccess(int32_t, uint32_t) {
  CANN_HOST_CALL(aclrtDeviceEnablePeerAccess);
  return kSuccess;
}

}  // extern "C"
