// libascendcl: memory. Device memory is host memory, counted for each device against its limit.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>

#include "bindings.h"
#include "core.h"
#include "memory.h"
#include "python.h"

using cann_host::DeviceBytes;
using cann_host::Fail;
using cann_host::GetOptions;
using cann_host::kInvalidParam;
using cann_host::kOutOfMemory;
using cann_host::kSuccess;
using cann_host::Where;

#define GROUP "Memory"

namespace {

using cann_host::Lock;

constexpr size_t kAlignment = 512;  // CANN's own

struct Block {
  size_t size;
  Where where;
  int device;
  uint64_t number;       // unique; a later block has a greater one
  uint64_t reservation;  // the addresses that it is mapped to; 0 if it is an allocation by itself
};

// Leaked on purpose: torch_npu still calls in while the process runs its static destructors.
struct Memory {
  cann_host::Mutex mutex;
  std::map<uintptr_t, Block> blocks;
  std::map<int, size_t> used;  // bytes of each device
  uint64_t next = 1;
  std::atomic<uint64_t> frees{0};
};

Memory& GetMemory() {
  static Memory* memory = new Memory;
  return *memory;
}
[[maybe_unused]] Memory& made = GetMemory();

int Allocate(const char* symbol, void** out, size_t size, Where where) {
  if (out == nullptr || size == 0) return Fail(kInvalidParam, "%s: size %zu", symbol, size);
  const int device = cann_host::CurrentDevice();
  if (const int code = cann_host::TakeBytes(symbol, size, where, device)) return code;
  void* bytes = nullptr;
  if (size > SIZE_MAX - kAlignment || posix_memalign(&bytes, kAlignment, size) != 0) {
    cann_host::GiveBackBytes(size, where, device);
    return Fail(kOutOfMemory, "%s: the host has no %zu bytes left", symbol, size);
  }
  cann_host::Fill(bytes, size, where);
  cann_host::AddBlock(bytes, size, where, device, 0);
  *out = bytes;
  return kSuccess;
}

int Release(const char* symbol, void* bytes, Where where) {
  cann_host::DoAllWork();  // some of it may be with this memory
  Memory& memory = GetMemory();
  {
    const cann_host::Lock lock(memory.mutex);
    const auto found = memory.blocks.find(reinterpret_cast<uintptr_t>(bytes));
    if (found == memory.blocks.end() || found->second.where != where ||
        found->second.reservation != 0) {
      return Fail(kInvalidParam, "%s: %p was not allocated here", symbol, bytes);
    }
    if (where == Where::kDevice) memory.used[found->second.device] -= found->second.size;
    cann_host::NoteWrite(bytes, found->second.size);
    ++memory.frees;
    memory.blocks.erase(found);
  }
  std::free(bytes);
  return kSuccess;
}

// The block that contains an address; the end if there is none. The caller holds the lock.
std::map<uintptr_t, Block>::const_iterator Find(const void* address) {
  const auto& blocks = GetMemory().blocks;
  const auto at = reinterpret_cast<uintptr_t>(address);
  const auto after = blocks.upper_bound(at);
  if (after == blocks.begin()) return blocks.end();
  const auto block = std::prev(after);
  return at - block->first < block->second.size ? block : blocks.end();
}

// What follows an address, at most `most` bytes: memory that is mapped side by side into one reservation
// is one piece. The newest block in it tells whether any part was unmapped since.
struct Piece {
  size_t bytes;
  uint64_t newest;
};
Piece PieceAt(const void* address, size_t most) {
  const Lock lock(GetMemory().mutex);
  auto block = Find(address);
  const auto end = GetMemory().blocks.cend();
  if (block == end) return {0, 0};
  const uint64_t reservation = block->second.reservation;
  auto next = block->first;
  Piece piece{0, 0};
  const auto at = reinterpret_cast<uintptr_t>(address);
  while (block != end && block->first == next && block->second.reservation == reservation) {
    next = block->first + block->second.size;
    piece = {next - at, std::max(piece.newest, block->second.number)};
    if (reservation == 0 || piece.bytes >= most) break;
    ++block;
  }
  return piece;
}

// Whether a copy or set may touch the memory; the kinds are those of aclrtMemcpyKind.
constexpr int kHostToHost = 0, kToDevice = 1, kToHost = 2, kInDevice = 3, kDefault = 4;
constexpr int kInOneDevice = 6, kBetweenDevices = 7;

int CheckCopy(const char* symbol, const void* dst, size_t dst_size, const void* src, size_t count,
              int kind) {
  if (kind < kHostToHost || kind > kBetweenDevices) {
    return Fail(kInvalidParam, "%s: %d is not a kind of copy", symbol, kind);
  }
  const bool in_device = kind == kInDevice || kind == kInOneDevice || kind == kBetweenDevices;
  // by default the addresses decide; what begins in device memory must end there
  const bool decides = kind == kDefault;
  const bool to_device = kind == kToDevice || in_device || (decides && cann_host::BytesAt(dst));
  const bool from_device = kind == kToHost || in_device || (decides && cann_host::BytesAt(src));
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

int CopyAsync(void* dst, size_t dst_size, const void* src, size_t count, int kind, void* stream) {
  const char* symbol = "aclrtMemcpyAsync";
  if (count == 0) return kSuccess;
  if (const int code = CheckCopy(symbol, dst, dst_size, src, count, kind)) return code;
  // The caller may take back ordinary host memory as soon as the call returns; only memory from
  // aclrtMallocHost stays until its work is done.
  std::shared_ptr<char> staged;
  if (cann_host::IsDeferring() && kind == kToDevice && !cann_host::IsAllocated(src, count)) {
    staged.reset(static_cast<char*>(std::malloc(count)), std::free);
    if (staged == nullptr) {
      return Fail(kOutOfMemory, "%s: the host has no %zu bytes left", symbol, count);
    }
    std::memcpy(staged.get(), src, count);
    src = staged.get();
  }
  // Memory that is allocated here, pinned memory too, must still be so when the copy is done, perhaps in
  // a replay.
  const auto from = cann_host::ReachOf(src, count), to = cann_host::ReachOf(dst, count);
  const int code = cann_host::OnStream(symbol, stream, [=] {
    (void)staged;
    for (const auto& reach : {from, to}) {
      if (!cann_host::IsThere(reach)) {
        return Fail(kInvalidParam, "%s: %zu bytes at %p are no longer allocated", symbol, count,
                    reach.data);
      }
    }
    std::memmove(dst, src, count);
    cann_host::NoteWrite(dst, count);
    return +kSuccess;
  });
  // A task queue's thread does not wait: the thread that queued the copy does.
  if (code == kSuccess && cann_host::IsDeferring() && kind == kToHost && to.block == 0 &&
      cann_host::IsPythonThread()) {
    return cann_host::FinishStream(symbol, stream);
  }
  return code;
}

std::atomic<uint64_t> prefetches{0};

// A prefetch reads memory into a cache, so it changes no value: it is counted when it is done.
int PrefetchAsync(const void* src, size_t size, int type, void* stream) {
  const char* symbol = "aclrtCmoAsync";
  constexpr int kPrefetch = 0;  // aclrtCmoType; CANN's documents allow this one only
  if (type != kPrefetch) {
    return Fail(kInvalidParam, "%s: cmoType is %d; it must be %d, a prefetch", symbol, type,
                kPrefetch);
  }
  if (size == 0 || !cann_host::IsAllocated(src, size)) {
    return Fail(kInvalidParam, "%s: %zu bytes at %p are not all in memory that was allocated here",
                symbol, size, src);
  }
  return cann_host::OnStream(symbol, stream, [=, reach = cann_host::ReachOf(src, size)] {
    if (!cann_host::IsThere(reach)) {
      return Fail(kInvalidParam, "%s: %zu bytes at %p are no longer allocated", symbol, size, src);
    }
    ++prefetches;
    return +kSuccess;
  });
}

int SetAsync(void* dst, size_t dst_size, int32_t value, size_t count, void* stream) {
  const char* symbol = "aclrtMemsetAsync";
  if (count == 0) return kSuccess;
  if (const int code = CheckSet(symbol, dst, dst_size, count)) return code;
  return cann_host::OnStream(symbol, stream, [=, reach = cann_host::ReachOf(dst, count)] {
    if (!cann_host::IsThere(reach)) {
      return Fail(kInvalidParam, "%s: %zu bytes at %p are no longer allocated", symbol, count, dst);
    }
    std::memset(dst, value, count);
    cann_host::NoteWrite(dst, count);
    return +kSuccess;
  });
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

int TakeBytes(const char* symbol, size_t size, Where where, int device) {
  if (where != Where::kDevice) return kSuccess;
  Memory& memory = GetMemory();
  const Lock lock(memory.mutex);
  size_t& used = memory.used[device];
  if (size > DeviceBytes() - std::min(DeviceBytes(), used)) {
    return Fail(kOutOfMemory,
                "%s: %zu bytes do not fit: device %d has %zu bytes, %zu of them in use (cann_host; "
                "CANN_HOST_MEMORY sets the size)",
                symbol, size, device, DeviceBytes(), used);
  }
  used += size;
  return kSuccess;
}

void GiveBackBytes(size_t size, Where where, int device) {
  if (where != Where::kDevice) return;
  const Lock lock(GetMemory().mutex);
  GetMemory().used[device] -= size;
}

void Fill(void* bytes, size_t size, Where where) {
  const int value = GetOptions().fill;
  if (value >= 0 && where == Where::kDevice) std::memset(bytes, value, size);
}

void AddBlock(void* begin, size_t size, Where where, int device, uint64_t reservation) {
  Memory& memory = GetMemory();
  const Lock lock(memory.mutex);
  memory.blocks[reinterpret_cast<uintptr_t>(begin)] = {size, where, device, memory.next++,
                                                       reservation};
}

void RemoveBlock(const void* begin) {
  const Lock lock(GetMemory().mutex);
  GetMemory().blocks.erase(reinterpret_cast<uintptr_t>(begin));
}

size_t BytesAt(const void* address) { return PieceAt(address, SIZE_MAX).bytes; }

Reach ReachOf(const void* data, size_t bytes) {
  const Piece piece = PieceAt(data, bytes);
  return {data, bytes, bytes <= piece.bytes ? piece.newest : 0};
}

bool IsThere(const Reach& reach) {
  return reach.block == 0 || ReachOf(reach.data, reach.bytes).block == reach.block;
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
  const cann_host::Lock lock(memory.mutex);
  *total_bytes = DeviceBytes();
  *free_bytes = DeviceBytes() - std::min(DeviceBytes(), memory.used[device]);
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
  const cann_host::Lock lock(GetMemory().mutex);
  if (const auto block = Find(pointer); block != GetMemory().blocks.cend()) {
    attributes->where = static_cast<int32_t>(block->second.where);
    attributes->device = block->second.device;
  }
  return kSuccess;
}

int aclrtMemcpy(void* dst, size_t dst_size, const void* src, size_t count, int kind) {
  CANN_HOST_CALL(aclrtMemcpy);
  if (const int code = cann_host::QueueFailure("aclrtMemcpy")) return code;
  if (count == 0) return kSuccess;
  if (const int code = CheckCopy("aclrtMemcpy", dst, dst_size, src, count, kind)) return code;
  std::memmove(dst, src, count);
  cann_host::NoteWrite(dst, count);
  return kSuccess;
}
int aclrtMemcpyAsync(void* dst, size_t dst_size, const void* src, size_t count, int kind,
                     void* stream) {
  CANN_HOST_CALL(aclrtMemcpyAsync);
  return cann_host::ReportLaunch(CopyAsync(dst, dst_size, src, count, kind, stream));
}
int aclrtMemset(void* dst, size_t dst_size, int32_t value, size_t count) {
  CANN_HOST_CALL(aclrtMemset);
  if (count == 0) return kSuccess;
  if (const int code = CheckSet("aclrtMemset", dst, dst_size, count)) return code;
  std::memset(dst, value, count);
  cann_host::NoteWrite(dst, count);
  return kSuccess;
}
int aclrtMemsetAsync(void* dst, size_t dst_size, int32_t value, size_t count, void* stream) {
  CANN_HOST_CALL(aclrtMemsetAsync);
  return cann_host::ReportLaunch(SetAsync(dst, dst_size, value, count, stream));
}

int aclrtCmoAsync(void* src, size_t size, int type, void* stream) {
  CANN_HOST_CALL(aclrtCmoAsync);
  return cann_host::ReportLaunch(PrefetchAsync(src, size, type, stream));
}

uint64_t cann_host_prefetches() { return prefetches; }

// A graph has prefetched.
void cann_host_count_prefetch() { ++prefetches; }

uint64_t cann_host_bytes_at(const void* address) { return cann_host::BytesAt(address); }

// The number of the allocation that these bytes are in, unique; 0 if they are not all in one.
uint64_t cann_host_block_of(const void* address, uint64_t bytes) {
  return cann_host::ReachOf(address, bytes).block;
}

// What Python must know at each call, in one number: 1 if a graph is being captured, 2 if work waits
// (or a launch on torch_npu's task queue has failed), 4 if memory is tracked; above, how often memory
// was freed.
uint64_t cann_host_state() {
  const bool waits = cann_host::IsLate() || cann_host::QueueHasFailed();
  return (cann_host::IsCapturing() ? 1 : 0) | (waits ? 2 : 0) | (cann_host::IsTracking() ? 4 : 0) |
         GetMemory().frees << 3;
}

// All memory is the host's, so every device can access the memory of every other device.
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
