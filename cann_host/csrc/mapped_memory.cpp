// libascendcl: addresses that are reserved, and memory that is mapped to them (torch_npu's
// PYTORCH_NPU_ALLOC_CONF=expandable_segments:True). Private pages of the host, so that a forked child
// has a copy, as of other memory.
#include <sys/mman.h>
#include <unistd.h>

#include <map>

#include "core.h"
#include "memory.h"

using cann_host::Fail;
using cann_host::kInvalidParam;
using cann_host::kOutOfMemory;
using cann_host::kSuccess;
using cann_host::Where;

#define GROUP "Mapped memory"

namespace {

constexpr int kReserved = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
constexpr int kPages = MAP_PRIVATE | MAP_ANONYMOUS;

// What aclrtMallocPhysical gives: its pages are at `home` while they are not mapped.
struct Physical {
  void* home;
  size_t size;
  Where where;
  int device;
  void* mapped;  // where they are mapped, null if they are not
};

struct Reservation {
  size_t size;
  uint64_t number;
  size_t mappings;
};

// Leaked on purpose: torch_npu still calls in while the process runs its static destructors.
struct Mapped {
  cann_host::Mutex mutex;
  std::map<uintptr_t, Reservation> reservations;
  std::map<const void*, Physical> physical;    // by handle
  std::map<uintptr_t, const void*> handle_at;  // by the address that it is mapped to
  uint64_t next = 1;
};

Mapped& GetMapped() {
  static Mapped* mapped = new Mapped;
  return *mapped;
}
[[maybe_unused]] Mapped& made = GetMapped();

uintptr_t Number(const void* address) { return reinterpret_cast<uintptr_t>(address); }

size_t PageBytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

size_t RoundUp(size_t size) { return (size + PageBytes() - 1) / PageBytes() * PageBytes(); }

// The reservation that contains these bytes; null if there is none. The caller holds the lock.
Reservation* ReservationOf(const void* address, size_t size) {
  auto& reservations = GetMapped().reservations;
  const auto after = reservations.upper_bound(Number(address));
  if (after == reservations.begin()) return nullptr;
  auto& found = *std::prev(after);
  const size_t offset = Number(address) - found.first;
  const bool is_inside = offset < found.second.size && size <= found.second.size - offset;
  return is_inside ? &found.second : nullptr;
}

// Moves pages; what was at the new place is gone.
bool Move(void* from, size_t size, void* to) {
  return mremap(from, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to;
}

// Whether something is mapped to any of these addresses. The caller holds the lock.
bool IsTaken(const void* address, size_t size) {
  const auto& handle_at = GetMapped().handle_at;
  const auto after = handle_at.lower_bound(Number(address) + size);
  if (after == handle_at.begin()) return false;
  const auto& last = *std::prev(after);
  return last.first + GetMapped().physical.at(last.second).size > Number(address);
}

struct PhysicalMemoryProperties {  // aclrtPhysicalMemProp
  int handle_type;
  int allocation_type;
  int attribute;
  uint32_t device;
  int where;
  uint64_t reserved;
};

}  // namespace

extern "C" {

int aclrtReserveMemAddress(void** out, size_t size, size_t alignment, void* wanted, uint64_t) {
  CANN_HOST_CALL(aclrtReserveMemAddress);
  CANN_HOST_NEEDS(aclrtReserveMemAddress, out);
  if (size == 0 || size > SIZE_MAX / 2 || alignment != 0 || wanted != nullptr) {
    return Fail(kInvalidParam,
                "aclrtReserveMemAddress: size %zu, alignment %zu, address %p; cann_host takes an "
                "alignment of 0 and no address",
                size, alignment, wanted);
  }
  void* address = mmap(nullptr, RoundUp(size), PROT_NONE, kReserved, -1, 0);
  if (address == MAP_FAILED) {
    return Fail(kOutOfMemory, "aclrtReserveMemAddress: the host has no %zu addresses left", size);
  }
  Mapped& mapped = GetMapped();
  const cann_host::Lock lock(mapped.mutex);
  mapped.reservations[Number(address)] = {RoundUp(size), mapped.next++, 0};
  *out = address;
  return kSuccess;
}

int aclrtReleaseMemAddress(void* address) {
  CANN_HOST_CALL(aclrtReleaseMemAddress);
  Mapped& mapped = GetMapped();
  const cann_host::Lock lock(mapped.mutex);
  const auto found = mapped.reservations.find(Number(address));
  if (found == mapped.reservations.end() || found->second.mappings != 0) {
    return Fail(kInvalidParam, "aclrtReleaseMemAddress: %p was not reserved here, or is in use",
                address);
  }
  munmap(address, found->second.size);
  mapped.reservations.erase(found);
  return kSuccess;
}

int aclrtMallocPhysical(void** handle, size_t size, const PhysicalMemoryProperties* properties,
                        uint64_t) {
  CANN_HOST_CALL(aclrtMallocPhysical);
  CANN_HOST_NEEDS(aclrtMallocPhysical, handle);
  CANN_HOST_NEEDS(aclrtMallocPhysical, properties);
  const auto where = static_cast<Where>(properties->where);
  const int device = static_cast<int>(properties->device);
  const bool is_known = where == Where::kHost || where == Where::kDevice;
  if (size == 0 || size % PageBytes() != 0 || !is_known ||
      (where == Where::kDevice && (device < 0 || device >= cann_host::GetOptions().devices))) {
    return Fail(kInvalidParam, "aclrtMallocPhysical: %zu bytes at location %d of device %d", size,
                properties->where, device);
  }
  if (const int code = cann_host::TakeBytes("aclrtMallocPhysical", size, where, device)) {
    return code;
  }
  void* home = mmap(nullptr, size, PROT_READ | PROT_WRITE, kPages, -1, 0);
  if (home == MAP_FAILED) {
    cann_host::GiveBackBytes(size, where, device);
    return Fail(kOutOfMemory, "aclrtMallocPhysical: the host has no %zu bytes left", size);
  }
  cann_host::Fill(home, size, where);
  Mapped& mapped = GetMapped();
  const cann_host::Lock lock(mapped.mutex);
  // a number, not an address: nothing can be read through it
  *handle = reinterpret_cast<void*>(static_cast<uintptr_t>(mapped.next++));
  mapped.physical[*handle] = {home, size, where, device, nullptr};
  return kSuccess;
}

int aclrtFreePhysical(void* handle) {
  CANN_HOST_CALL(aclrtFreePhysical);
  Mapped& mapped = GetMapped();
  const cann_host::Lock lock(mapped.mutex);
  const auto found = mapped.physical.find(handle);
  if (found == mapped.physical.end() || found->second.mapped != nullptr) {
    return Fail(kInvalidParam, "aclrtFreePhysical: %p was not allocated here, or is mapped",
                handle);
  }
  const Physical& memory = found->second;
  munmap(memory.home, memory.size);
  cann_host::GiveBackBytes(memory.size, memory.where, memory.device);
  mapped.physical.erase(found);
  return kSuccess;
}

int aclrtMapMem(void* address, size_t size, size_t offset, void* handle, uint64_t) {
  CANN_HOST_CALL(aclrtMapMem);
  Mapped& mapped = GetMapped();
  const cann_host::Lock lock(mapped.mutex);
  Reservation* reservation = ReservationOf(address, size);
  const auto found = mapped.physical.find(handle);
  if (reservation == nullptr || found == mapped.physical.end() || offset != 0 ||
      found->second.mapped != nullptr || found->second.size != size ||
      Number(address) % PageBytes() != 0 || IsTaken(address, size)) {
    return Fail(
        kInvalidParam,
        "aclrtMapMem: %zu bytes of handle %p at offset %zu do not fit at %p: cann_host maps all "
        "of a handle, once, to reserved addresses that are free",
        size, handle, offset, address);
  }
  Physical& memory = found->second;
  if (!Move(memory.home, size, address)) {
    return Fail(kOutOfMemory, "aclrtMapMem: the host cannot map %zu bytes", size);
  }
  memory.mapped = address;
  mapped.handle_at[Number(address)] = handle;
  ++reservation->mappings;
  cann_host::AddBlock(address, size, memory.where, memory.device, reservation->number);
  return kSuccess;
}

int aclrtUnmapMem(void* address) {
  CANN_HOST_CALL(aclrtUnmapMem);
  cann_host::DoAllWork();  // some of it may be with this memory
  Mapped& mapped = GetMapped();
  const cann_host::Lock lock(mapped.mutex);
  const auto at = mapped.handle_at.find(Number(address));
  if (at == mapped.handle_at.end()) {
    return Fail(kInvalidParam, "aclrtUnmapMem: nothing is mapped to %p", address);
  }
  Physical& memory = mapped.physical.at(at->second);
  void* home = mmap(nullptr, memory.size, PROT_NONE, kReserved, -1, 0);
  cann_host::RemoveBlock(address);
  const bool is_moved = home != MAP_FAILED && Move(address, memory.size, home);
  // The addresses stay reserved. Another thread of the process may have taken them in between.
  if (!is_moved ||
      mmap(address, memory.size, PROT_NONE, kReserved | MAP_FIXED_NOREPLACE, -1, 0) != address) {
    return Fail(kOutOfMemory, "aclrtUnmapMem: the host cannot unmap %zu bytes", memory.size);
  }
  memory.home = home;
  memory.mapped = nullptr;
  --ReservationOf(address, memory.size)->mappings;
  mapped.handle_at.erase(at);
  return kSuccess;
}

}  // extern "C"
