// libascendcl: streams, and the work that is launched on them. Events are in event.cpp, captured graphs
// in capture.cpp.
//
// The thread that launches work does it before the launch returns: the order of the program is kept, and
// the launch returns the error. With late streams (CANN_HOST_STREAMS=late) a launch is only added to its
// stream's queue, and the thread that waits for the stream, an event or the device does the work: a
// program that forgot to wait then reads the old values, as it can on a device.
#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <new>
#include <utility>

#include "bindings.h"
#include "python.h"
#include "stream.h"

namespace cann_host {

StreamsState& GetStreams() {
  static StreamsState* state = new StreamsState;
  return *state;
}
[[maybe_unused]] static StreamsState& made = GetStreams();

std::shared_ptr<StreamState> FindStream(void* handle) {
  StreamsState& state = GetStreams();
  if (handle == nullptr) {
    auto& found = state.defaults[CurrentDevice()];
    if (!found) {
      found = std::make_shared<StreamState>();
      found->id = -1;
      found->device = CurrentDevice();
    }
    return found;
  }
  const auto found = state.streams.find(handle);
  return found == state.streams.end() ? nullptr : found->second;
}

int NoStream(const char* symbol, void* handle) {
  return Fail(kInvalidParam, "%s: %p is no stream", symbol, handle);
}

namespace {

// A thread that Python does not know has launched work; from then on all work waits.
std::atomic<bool> has_task_queue{false};
std::atomic<bool> waits_for_values{false};
// The interpreter is about to end, and with it threads that may hold the work's lock: from now on no
// work is done, and no thread waits.
std::atomic<bool> is_leaving{false};

// Locks the work. While it waits, other threads may have the interpreter: the thread that does the work
// may need it. Python is found at run time; this library is not linked to it.
class WorkLock {
 public:
  WorkLock() : locked_(!is_leaving) {
    auto& work = GetStreams().work;
    if (!locked_ || work.try_lock()) return;
    static const auto save =
        reinterpret_cast<void* (*)()>(dlsym(RTLD_DEFAULT, "PyEval_SaveThread"));
    static const auto restore =
        reinterpret_cast<void (*)(void*)>(dlsym(RTLD_DEFAULT, "PyEval_RestoreThread"));
    static const auto has = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "PyGILState_Check"));
    if (GetPython() != nullptr && has && save && restore && has()) {
      void* thread = save();
      work.lock();
      restore(thread);
    } else {
      work.lock();
    }
  }
  ~WorkLock() {
    if (locked_) GetStreams().work.unlock();
  }
  WorkLock(const WorkLock&) = delete;

 private:
  const bool locked_;
};

using Done = std::function<bool()>;
void Work(const std::shared_ptr<StreamState>& stream, const Done& is_done);

// Whether a record of an event is done. The caller holds the lock.
Done IsRecorded(const EventState* event, uint64_t number) {
  return [=] { return event->done >= number; };
}

// The other streams that will write to an address. The caller holds the lock.
std::vector<std::shared_ptr<StreamState>> WritersOf(const void* address,
                                                    const std::shared_ptr<StreamState>& but) {
  std::vector<std::shared_ptr<StreamState>> found;
  const auto writes = [&](const Item& item) {
    return item.does == Item::Does::kTask && item.value.data == address;
  };
  const auto look = [&](const std::shared_ptr<StreamState>& stream) {
    const auto& queue = stream->queue;
    if (stream != but && std::any_of(queue.begin(), queue.end(), writes)) found.push_back(stream);
  };
  for (const auto& [handle, stream] : GetStreams().streams) look(stream);
  for (const auto& [device, stream] : GetStreams().defaults) look(stream);
  return found;
}

// Does the work before a wait for an event.
void WaitForEvent(const std::shared_ptr<StreamState>& stream, const Item& wait) {
  std::shared_ptr<StreamState> source;
  {
    const Lock lock(GetStreams().mutex);
    if (wait.event->done < wait.number) source = wait.event->stream.lock();
  }
  if (source && source != stream) Work(source, IsRecorded(wait.event.get(), wait.number));
}

// Does the work before a wait for a value; false if nothing that was launched ends the wait.
bool WaitForItsValue(const std::shared_ptr<StreamState>& stream, const Item& wait) {
  StreamsState& state = GetStreams();
  const auto is_over = [&] {
    const Lock lock(state.mutex);
    return wait.holds();
  };
  if (is_over()) return true;
  std::vector<std::shared_ptr<StreamState>> sources;
  {
    const Lock lock(state.mutex);
    sources = WritersOf(wait.value.data, stream);
  }
  for (const auto& source : sources) {
    Work(source, wait.holds);
    if (is_over()) return true;
  }
  return false;
}

// Does the work that the stream has now, until something is done if it is given. It does not do work
// that other threads add meanwhile.
void Work(const std::shared_ptr<StreamState>& stream, const Done& is_done) {
  StreamsState& state = GetStreams();
  size_t left = SIZE_MAX;
  while (!is_leaving) {
    Item item;
    {
      const Lock lock(state.mutex);
      left = std::min(left, stream->queue.size());
      if (left-- == 0 || (is_done && is_done())) return;
      item = std::move(stream->queue.front());
      stream->queue.pop_front();
      if (item.task) state.doing.push_back(stream.get());
    }
    if (item.does == Item::Does::kTask) {
      if (stream->failure == kSuccess) stream->failure = item.task();
      const Lock lock(state.mutex);
      state.doing.pop_back();
    } else if (item.does == Item::Does::kWait) {
      WaitForEvent(stream, item);
    } else if (item.does == Item::Does::kWaitValue) {
      if (!IsThere(item.value)) {
        stream->failure =
            Fail(kInvalidParam, "aclrtValueWait: %p is no longer allocated", item.value.data);
        continue;
      }
      if (WaitForItsValue(stream, item)) continue;
      const Lock lock(state.mutex);
      stream->queue.push_front(std::move(item));
      return;
    } else {
      const Lock lock(state.mutex);
      item.event->time = Clock::now();
      item.event->done = item.number;
    }
  }
}

// Whether the stream's next work is to wait for a value.
bool IsBlocked(const std::shared_ptr<StreamState>& stream) {
  const Lock lock(GetStreams().mutex);
  return !stream->queue.empty() && stream->queue.front().does == Item::Does::kWaitValue;
}

// Does all of a stream's work and returns its code.
int Finish(const std::shared_ptr<StreamState>& stream) {
  const WorkLock lock;
  Work(stream, nullptr);
  const int code = stream->failure.exchange(kSuccess);
  if (code == kSuccess && IsBlocked(stream)) {
    return Fail(
        kFailure,
        "cann_host: the stream waits for a value, or for an external event, that nothing has "
        "written; on a device this wait would not end");
  }
  if (code != kLostInFork) return code;
  return Fail(kFailure,
              "cann_host: this process was forked while another thread did the stream's work, "
              "which is not done here");
}

// The streams of a device, or all for -1.
std::vector<std::shared_ptr<StreamState>> Streams(int device) {
  StreamsState& state = GetStreams();
  const Lock lock(state.mutex);
  std::vector<std::shared_ptr<StreamState>> found;
  for (const auto& [handle, stream] : state.streams) {
    if (device < 0 || stream->device == device) found.push_back(stream);
  }
  for (const auto& [at, stream] : state.defaults) {
    if (device < 0 || at == device) found.push_back(stream);
  }
  return found;
}

int FinishDevice(const char* symbol, int device) {
  if (const int code = QueueFailure(symbol)) return code;
  int first = kSuccess;
  if (!IsLate()) return first;
  for (const auto& stream : Streams(device)) {
    const int code = Finish(stream);
    if (first == kSuccess) first = code;
  }
  return first;
}

// A wait for a captured stream would never end.
int Captures(const char* symbol) {
  return Fail(kFailure,
              "%s: the stream is being captured; nothing can wait for it before the capture ends",
              symbol);
}

int NewStream(const char* symbol, void** out) {
  if (out == nullptr) return Fail(kInvalidParam, "%s: no place for the stream", symbol);
  auto stream = std::make_shared<StreamState>();
  StreamsState& state = GetStreams();
  const Lock lock(state.mutex);
  stream->id = state.next_id++;
  stream->device = CurrentDevice();
  *out = stream.get();
  state.streams[*out] = std::move(stream);
  return kSuccess;
}

int EndStream(const char* symbol, void* handle) {
  if (handle == nullptr) return NoStream(symbol, handle);
  const int code = FinishStream(symbol, handle);
  StreamsState& state = GetStreams();
  const Lock lock(state.mutex);
  state.streams.erase(handle);
  return code;
}

// A fork while another thread does late work leaves that work undone in the child.
struct WorkAtFork {
  static void Child() {
    StreamsState& state = GetStreams();
    new (&state.work) std::recursive_mutex;
    for (StreamState* stream : state.doing) stream->failure = kLostInFork;
    state.doing.clear();
  }
  WorkAtFork() { pthread_atfork(nullptr, nullptr, Child); }
};
const WorkAtFork work_at_fork;

}  // namespace

void FinishUntil(const std::shared_ptr<StreamState>& stream, const EventState* until,
                 uint64_t number) {
  const WorkLock lock;
  Work(stream, IsRecorded(until, number));
}

bool IsLate() { return GetOptions().late_streams || has_task_queue || waits_for_values; }

void WorkLate() { waits_for_values = true; }

int OnStream(const char* symbol, void* handle, Task task) {
  StreamsState& state = GetStreams();
  if (!IsLate() && GetPython() != nullptr && !IsPythonThread()) has_task_queue = true;
  {
    const Lock lock(state.mutex);
    const auto stream = FindStream(handle);
    if (!stream) return NoStream(symbol, handle);
    if (const auto update = state.updating.find(stream.get()); update != state.updating.end()) {
      update->second.tasks.push_back(std::move(task));
      return kSuccess;
    }
    if (state.graph && state.capturing.count(stream.get())) {
      if (const auto open = state.grouping.find(stream.get()); open != state.grouping.end()) {
        open->second->tasks.push_back(std::move(task));
      } else {
        state.graph->items.push_back({Item::Does::kTask, std::move(task)});
      }
      return kSuccess;
    }
    if (IsLate()) {
      stream->queue.push_back({Item::Does::kTask, std::move(task)});
      return kSuccess;
    }
  }
  return task();
}

int OnStreamInTurn(const char* symbol, void* handle, Task task) {
  StreamsState& state = GetStreams();
  {
    const Lock lock(state.mutex);
    const auto stream = FindStream(handle);
    if (stream && IsLate() && !state.capturing.count(stream.get())) {
      if (state.last_turn) {
        stream->queue.push_back({Item::Does::kWait, nullptr, state.last_turn, 1});
      }
      stream->queue.push_back({Item::Does::kTask, std::move(task)});
      auto turn = std::make_shared<EventState>();
      turn->stream = stream;
      turn->recorded = 1;
      stream->queue.push_back({Item::Does::kRecord, nullptr, turn, 1});
      state.last_turn = std::move(turn);
      return kSuccess;
    }
  }
  return OnStream(symbol, handle, std::move(task));
}

int FinishStream(const char* symbol, void* handle) {
  if (const int code = QueueFailure(symbol)) return code;
  StreamsState& state = GetStreams();
  std::shared_ptr<StreamState> stream;
  {
    const Lock lock(state.mutex);
    stream = FindStream(handle);
    if (!stream) return NoStream(symbol, handle);
    if (state.capturing.count(stream.get())) return Captures(symbol);
    if (stream->queue.empty() && stream->failure == kSuccess) return kSuccess;
  }
  return Finish(stream);
}

void DoAllWork() {
  if (!IsLate()) return;
  const WorkLock lock;
  for (const auto& stream : Streams(-1)) Work(stream, nullptr);
}

bool IsCapturing() { return is_capturing; }

bool IsDeferring() { return IsLate() || is_capturing; }

}  // namespace cann_host

using namespace cann_host;

extern "C" {

#define GROUP "Streams"

int aclrtCreateStream(void** stream) {
  CANN_HOST_CALL(aclrtCreateStream);
  return NewStream("aclrtCreateStream", stream);
}
int aclrtCreateStreamWithConfig(void** stream, uint32_t, uint32_t) {
  CANN_HOST_CALL(aclrtCreateStreamWithConfig);
  return NewStream("aclrtCreateStreamWithConfig", stream);
}
int aclrtDestroyStream(void* stream) {
  CANN_HOST_CALL(aclrtDestroyStream);
  return EndStream("aclrtDestroyStream", stream);
}
int aclrtDestroyStreamForce(void* stream) {
  CANN_HOST_CALL(aclrtDestroyStreamForce);
  return EndStream("aclrtDestroyStreamForce", stream);
}
int aclrtSynchronizeStream(void* stream) {
  CANN_HOST_CALL(aclrtSynchronizeStream);
  return FinishStream("aclrtSynchronizeStream", stream);
}
int aclrtSynchronizeStreamWithTimeout(void* stream, int32_t) {
  CANN_HOST_CALL(aclrtSynchronizeStreamWithTimeout);
  return FinishStream("aclrtSynchronizeStreamWithTimeout", stream);
}
int aclrtSynchronizeDevice() {
  CANN_HOST_CALL(aclrtSynchronizeDevice);
  return FinishDevice("aclrtSynchronizeDevice", CurrentDevice());
}
int aclrtSynchronizeDeviceWithTimeout(int32_t) {
  CANN_HOST_CALL(aclrtSynchronizeDeviceWithTimeout);
  return FinishDevice("aclrtSynchronizeDeviceWithTimeout", CurrentDevice());
}

// If a stream has work left, a query reports this and does the work: so a program that queries until the
// work is done ends.
int aclrtStreamQuery(void* handle, int* status) {
  CANN_HOST_CALL(aclrtStreamQuery);
  CANN_HOST_NEEDS(aclrtStreamQuery, status);
  bool idle = false;
  {
    const Lock lock(GetStreams().mutex);
    const auto stream = FindStream(handle);
    if (!stream) return NoStream("aclrtStreamQuery", handle);
    idle = stream->queue.empty();
  }
  *status = idle ? 0 : 1;
  const int code = FinishStream("aclrtStreamQuery", handle);
  bool is_blocked = false;
  {
    const Lock lock(GetStreams().mutex);
    const auto stream = FindStream(handle);
    is_blocked = stream && !stream->queue.empty();
  }
  return is_blocked ? +kSuccess : code;
}

int aclrtStreamGetId(void* handle, int32_t* id) {
  CANN_HOST_CALL(aclrtStreamGetId);
  CANN_HOST_NEEDS(aclrtStreamGetId, id);
  const Lock lock(GetStreams().mutex);
  const auto stream = FindStream(handle);
  if (!stream) return NoStream("aclrtStreamGetId", handle);
  *id = stream->id;
  return kSuccess;
}

// A stream stops at its first failure anyway.
int aclrtSetStreamFailureMode(void*, uint64_t) {
  CANN_HOST_CALL(aclrtSetStreamFailureMode);
  return kSuccess;
}

int aclrtSetStreamOverflowSwitch(void* handle, uint32_t flag) {
  CANN_HOST_CALL(aclrtSetStreamOverflowSwitch);
  const Lock lock(GetStreams().mutex);
  const auto stream = FindStream(handle);
  if (!stream) return NoStream("aclrtSetStreamOverflowSwitch", handle);
  stream->overflow_switch = flag;
  return kSuccess;
}

int aclrtGetStreamOverflowSwitch(void* handle, uint32_t* flag) {
  CANN_HOST_CALL(aclrtGetStreamOverflowSwitch);
  CANN_HOST_NEEDS(aclrtGetStreamOverflowSwitch, flag);
  const Lock lock(GetStreams().mutex);
  const auto stream = FindStream(handle);
  if (!stream) return NoStream("aclrtGetStreamOverflowSwitch", handle);
  *flag = stream->overflow_switch;
  return kSuccess;
}

void cann_host_leave() { is_leaving = true; }

int cann_host_has_task_queue() { return has_task_queue ? 1 : 0; }

}  // extern "C"
