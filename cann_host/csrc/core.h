// What every file of the stand-in needs: its options, error texts, faults on demand, and the list of
// its functions. README.md says which file stands in for which library of CANN.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>

#include "mutex.h"

namespace cann_host {

// Codes of the public ACL headers, the ones this library returns.
enum : int {
  kSuccess = 0,
  kInvalidParam = 100000,
  kUninitialized = 100001,
  kContextNull = 107002,  // what aclrtGetDevice returns before a device is set
  kInvalidDevice = 200002,
  kFeatureUnsupported = 200006,
  kOutOfMemory = 207001,  // the one torch_npu takes for an out-of-memory error
  kFailure = 500001,
};

// The options: the chip and version that this process reports. Set once, before torch_npu reads them.
struct Options {
  std::string soc = "Ascend910B2";
  std::string cann_version = "9.1.0";
  int devices = 1;
  size_t memory = 0;          // bytes of each device; 0 shares the host's memory among them
  bool late_streams = false;  // work on a stream is done when the program waits for it
  int fill = -1;  // the bytes of new device memory; -1 leaves them as the host gives them
};
const Options& GetOptions();

// Stores the text as the recent error and returns the code.
int Fail(int code, const char* fmt, ...) __attribute__((format(printf, 2, 3)));

// Fails with a text that names the symbol: a call that is not implemented must not look like success.
int Unimplemented(const char* symbol);

// The text for aclGetRecentErrMsg and GEGetErrorMsg; empty if nothing failed yet.
// The pointer stays valid until the next call in this thread.
const char* RecentError();

// The code with which this call of a symbol must fail (see cann_host_add_fault); 0 if it must not.
int Fault(const char* symbol);

// torch_npu's task queue, if it is on (TASK_QUEUE_ENABLE): a thread that launches what other threads
// queue. After a call that failed in that thread, torch_npu reports it once and drops all later
// launches. A launching function returns its code through ReportLaunch; from the first failure on,
// QueueFailure fails for every wait.
int ReportLaunch(int code);
int QueueFailure(const char* symbol);
bool QueueHasFailed();

// Work on a stream, null for the device's default stream: done now, or later in the stream's order, or
// recorded while a graph is captured. Returns the work's own code if it was done.
using Task = std::function<int()>;
int OnStream(const char* symbol, void* stream, Task task);
// The same for collectives, which communicate with other processes: done after all collectives that
// were launched before, on any stream. So processes that launch in the same order also communicate in
// the same order.
int OnStreamInTurn(const char* symbol, void* stream, Task task);
// Waits for a stream and returns the code of its work.
int FinishStream(const char* symbol, void* stream);
// Does all the work that is left on any stream. The next wait for a stream returns its work's code.
void DoAllWork();
// Whether a launch may not be done when it returns.
bool IsDeferring();
bool IsCapturing();
// Whether work is done only when the program waits for it: with late streams, or after a thread that
// Python does not know has launched (torch_npu's task queue). The thread that waits for the queue holds
// Python's lock.
bool IsLate();

// The device that this thread has set; the first device if it has set none.
int CurrentDevice();

// Device memory; null, with the reason stored, if there is not enough.
void* AllocateDevice(size_t bytes);
void FreeDevice(void* memory);

// Bytes of each device.
size_t DeviceBytes();

// The bytes from an address to the end of its memory; 0 if that was not allocated here.
size_t BytesAt(const void* address);

// Whether these bytes lie inside one piece of memory that was allocated here.
inline bool IsAllocated(const void* memory, size_t bytes) {
  const size_t found = BytesAt(memory);
  return found != 0 && bytes <= found;
}

// Memory that work touches when it is done, perhaps much later, or several times in a captured graph.
struct Reach {
  const void* data;
  size_t bytes;
  uint64_t block;  // the allocation they are in, 0 if they are not all in one that was made here
};
Reach ReachOf(const void* data, size_t bytes);
// Whether it is still the same allocation; true for memory that was not allocated here.
bool IsThere(const Reach& reach);

// Memory was written, or is freed: what Python keeps of it is old (tracked.cpp). To be called after the
// write.
void NoteWrite(const void* data, size_t bytes);
bool IsTracking();

// The objects of one kind that callers have as handles. A handle is looked up here before it is used:
// it may be the handle of something else, or destroyed.
template <typename T>
class Handles {
 public:
  T* Give(T object) {
    auto owned = std::make_unique<T>(std::move(object));
    const Lock lock(mutex_);
    given_[owned.get()] = next_++;
    return owned.release();
  }
  // A number that no other object has had; 0 if the handle was never given, or is already taken.
  uint64_t Number(const T* handle) {
    const Lock lock(mutex_);
    const auto found = given_.find(handle);
    return found == given_.end() ? 0 : found->second;
  }
  bool Has(const T* handle) { return Number(handle) != 0; }
  std::unique_ptr<const T> Take(const T* handle) {
    const Lock lock(mutex_);
    return std::unique_ptr<const T>(given_.erase(handle) ? handle : nullptr);
  }
  // A call with it has failed. torch_npu never destroys the arguments of such a call, other callers may:
  // it is destroyed after kMostAbandoned others.
  void Abandon(const T* handle, uint64_t number) {
    std::unique_ptr<const T> oldest;
    const Lock lock(mutex_);
    abandoned_.push_back({handle, number});
    if (abandoned_.size() <= kMostAbandoned) return;
    const auto found = given_.find(abandoned_.front().first);
    if (found != given_.end() && found->second == abandoned_.front().second) {
      oldest.reset(found->first);
      given_.erase(found);
    }
    abandoned_.pop_front();
  }

 private:
  static constexpr size_t kMostAbandoned = 256;
  Mutex mutex_;
  uint64_t next_ = 1;
  std::unordered_map<const T*, uint64_t> given_;
  std::deque<std::pair<const T*, uint64_t>> abandoned_;
};

// The handles of a type. Leaked on purpose: torch_npu still calls in while static destructors run.
template <typename T>
inline Handles<T>& handles_of = *new Handles<T>;
template <typename T>
Handles<T>& HandlesOf() {
  return handles_of<T>;
}

// Bytes of an element of an aclDataType, 0 for one that is not known here or shorter than a byte.
int64_t DtypeBytes(int dtype);

// ---- the list of the functions ----
// Every function of CANN that this library has puts an entry in a linker section. The documentation is
// made from these entries, and the names in CANN_HOST_FAIL are checked with them.
struct Entry {
  const char* group;
  const char* symbol;
  const char* kind;  // "does", "fails" by its name, or "makes": returns no code that could fail
};

}  // namespace cann_host

// For a file or a part of it: #define GROUP "the topic of the functions below".
#define CANN_HOST_NAMED_ENTRY(id, symbol, kind)                                  \
  static const cann_host::Entry cann_host_entry_##id{GROUP, symbol, kind};       \
  __attribute__((section("cann_host_entries"),                                   \
                 used)) static const cann_host::Entry* const cann_host_at_##id = \
      &cann_host_entry_##id;
#define CANN_HOST_ENTRY(symbol, kind) CANN_HOST_NAMED_ENTRY(symbol, #symbol, kind)

// Begins the body of every function that returns a code.
#define CANN_HOST_CALL(symbol)    \
  CANN_HOST_ENTRY(symbol, "does") \
  if (const int cann_host_code = cann_host::Fault(#symbol)) return cann_host_code

// Follows it if the function writes a result to an address, or reads text from one.
#define CANN_HOST_NEEDS(symbol, argument)                                                   \
  if ((argument) == nullptr) {                                                              \
    return cann_host::Fail(cann_host::kInvalidParam, "%s: %s is null", #symbol, #argument); \
  }                                                                                         \
  static_assert(true, "so that a semicolon follows")
