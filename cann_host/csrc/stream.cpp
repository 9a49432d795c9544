// libascendcl: streams, events and captured graphs.
//
// Work is done by the thread that launches it, before the launch returns: every order a program may
// ask for is kept, and a failure shows where it is made. With late streams (CANN_HOST_STREAMS=late)
// a launch only joins its stream's queue, and whoever waits for the stream, an event or the device
// does the work: a program that forgot to wait then reads what was there before, as it can on a
// device.
#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <set>
#include <utility>
#include <vector>

#include "core.h"
#include "python.h"

namespace cann_host {
namespace {

using Clock = std::chrono::steady_clock;

struct StreamState;

struct EventState {
  Clock::time_point time;
  uint64_t recorded = 0;  // how often a record was asked for
  uint64_t done = 0;      // the last of them that was carried out
  bool captured = false;  // the last record is part of the graph that is being captured
  std::weak_ptr<StreamState> stream;  // where it was recorded
};

// One piece of work: a task, or the record of an event, or the wait for one.
struct Item {
  Task task;
  std::shared_ptr<EventState> event;
  uint64_t number = 0;  // the record, of the event's
  bool waits = false;
};

constexpr int kLostInFork = -1;  // no code of CANN's

struct StreamState {
  int32_t id = 0;
  int device = 0;
  uint32_t overflow_switch = 0;
  std::deque<Item> queue;
  // Of a task since somebody last waited; what follows it is dropped, as on a device.
  std::atomic<int> failure{0};
};

struct Captured {
  std::vector<Task> tasks;
};

// Work of Python's in a captured graph goes by its number. That it can go with the graph is noted
// here and not told at once: whoever destroys a graph may hold locks that Python's threads wait for.
PythonFunction replay_in_python;
struct Ended {
  Mutex mutex;
  std::vector<int64_t> numbers;
};
Ended& ended = *new Ended;  // leaked: see core.cpp

struct Recorded {
  const int64_t number;
  explicit Recorded(int64_t of) : number(of) {}
  Recorded(const Recorded&) = delete;
  ~Recorded() {
    const Lock lock(ended.mutex);
    ended.numbers.push_back(number);
  }
};

// Leaked: see core.cpp.
struct State {
  std::recursive_mutex work;  // whoever does late work holds it
  Mutex mutex;                // of everything below, for moments only
  std::map<void*, std::shared_ptr<StreamState>> streams;
  std::map<int, std::shared_ptr<StreamState>> defaults;   // by device: the stream that null means
  std::map<void*, std::shared_ptr<EventState>> events;
  int32_t next_id = 0;
  std::shared_ptr<EventState> last_turn;  // of OnStreamInTurn
  std::vector<StreamState*> doing;  // those a task of which is being done late
  std::unique_ptr<Captured> graph;  // one capture at a time
  std::set<StreamState*> capturing;
  std::map<void*, std::shared_ptr<const Captured>> graphs;  // finished ones
};

State& GetState() {
  static State* state = new State;
  return *state;
}
[[maybe_unused]] State& made = GetState();

std::atomic<bool> is_capturing{false};
// Work was launched by a thread that Python does not know, and from then on all work waits.
std::atomic<bool> has_task_queue{false};
// The interpreter is about to go, and with it threads that may hold the work's lock: nothing is done
// any more, and nothing waited for.
std::atomic<bool> is_leaving{false};

// Locks the work, and lets other threads have the interpreter while it waits: the one that does the
// work may need it. Python is found at run time; this library is not linked to it.
class WorkLock {
 public:
  WorkLock() : locked_(!is_leaving) {
    auto& work = GetState().work;
    if (!locked_ || work.try_lock()) return;
    static const auto save = reinterpret_cast<void* (*)()>(dlsym(RTLD_DEFAULT, "PyEval_SaveThread"));
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
    if (locked_) GetState().work.unlock();
  }
  WorkLock(const WorkLock&) = delete;

 private:
  const bool locked_;
};

// Null for a handle that no stream has. Wants the lock.
std::shared_ptr<StreamState> FindStream(void* handle) {
  State& state = GetState();
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

std::shared_ptr<EventState> FindEvent(void* handle) {
  const auto found = GetState().events.find(handle);
  return found == GetState().events.end() ? nullptr : found->second;
}

int NoStream(const char* symbol, void* handle) {
  return Fail(kInvalidParam, "%s: %p is no stream", symbol, handle);
}

int NoEvent(const char* symbol, void* handle) {
  return Fail(kInvalidParam, "%s: %p is no event", symbol, handle);
}

// Does the work the stream has now, up to a record of an event if one is given. What other threads add
// meanwhile is not waited for.
void Work(const std::shared_ptr<StreamState>& stream, const EventState* until, uint64_t number) {
  State& state = GetState();
  size_t left = SIZE_MAX;
  while (!is_leaving) {
    Item item;
    {
      const Lock lock(state.mutex);
      left = std::min(left, stream->queue.size());
      if (left-- == 0 || (until != nullptr && until->done >= number)) return;
      item = std::move(stream->queue.front());
      stream->queue.pop_front();
      if (item.task) state.doing.push_back(stream.get());
    }
    if (item.task) {
      if (stream->failure == kSuccess) stream->failure = item.task();
      const Lock lock(state.mutex);
      state.doing.pop_back();
    } else if (item.waits) {
      std::shared_ptr<StreamState> source;
      {
        const Lock lock(state.mutex);
        if (item.event->done < item.number) source = item.event->stream.lock();
      }
      if (source && source != stream) Work(source, item.event.get(), item.number);
    } else {
      const Lock lock(state.mutex);
      item.event->time = Clock::now();
      item.event->done = item.number;
    }
  }
}

// Does all of a stream's work and hands over how it went.
int Finish(const std::shared_ptr<StreamState>& stream) {
  const WorkLock lock;
  Work(stream, nullptr, 0);
  const int code = stream->failure.exchange(kSuccess);
  if (code != kLostInFork) return code;
  return Fail(kFailure, "cann_host: this process was forked while another thread did the stream's work, "
                        "which is not done here");
}

// Those of a device, or all for -1.
std::vector<std::shared_ptr<StreamState>> Streams(int device) {
  State& state = GetState();
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

// What waits for a captured stream would wait for ever.
int Captures(const char* symbol) {
  return Fail(kFailure,
              "%s: the stream is being captured; nothing can wait for it before the capture ends",
              symbol);
}

int NewStream(const char* symbol, void** out) {
  if (out == nullptr) return Fail(kInvalidParam, "%s: no place for the stream", symbol);
  auto stream = std::make_shared<StreamState>();
  State& state = GetState();
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
  State& state = GetState();
  const Lock lock(state.mutex);
  state.streams.erase(handle);
  return code;
}

// A fork while another thread does late work leaves that work undone in the child.
struct WorkAtFork {
  static void Child() {
    State& state = GetState();
    new (&state.work) std::recursive_mutex;
    for (StreamState* stream : state.doing) stream->failure = kLostInFork;
    state.doing.clear();
  }
  WorkAtFork() { pthread_atfork(nullptr, nullptr, Child); }
};
const WorkAtFork work_at_fork;

int NewEvent(const char* symbol, void** out) {
  if (out == nullptr) return Fail(kInvalidParam, "%s: no place for the event", symbol);
  auto event = std::make_shared<EventState>();
  State& state = GetState();
  const Lock lock(state.mutex);
  *out = event.get();
  state.events[*out] = std::move(event);
  return kSuccess;
}

// The work before the last record of an event, done; null, with the reason kept, if it is none.
std::shared_ptr<EventState> FinishEvent(const char* symbol, void* handle, bool* was_done) {
  if (QueueFailure(symbol)) return nullptr;
  State& state = GetState();
  std::shared_ptr<EventState> event;
  std::shared_ptr<StreamState> stream;
  uint64_t number = 0;
  {
    const Lock lock(state.mutex);
    event = FindEvent(handle);
    if (!event) {
      NoEvent(symbol, handle);
      return nullptr;
    }
    number = event->recorded;
    *was_done = event->done >= number;
    if (*was_done) return event;
    stream = event->stream.lock();
  }
  if (stream) {
    const WorkLock lock;
    Work(stream, event.get(), number);
  }
  return event;
}

}  // namespace

bool IsLate() { return GetOptions().late_streams || has_task_queue; }

int OnStream(const char* symbol, void* handle, Task task) {
  State& state = GetState();
  if (!IsLate() && GetPython() != nullptr && !IsPythonThread()) has_task_queue = true;
  {
    const Lock lock(state.mutex);
    const auto stream = FindStream(handle);
    if (!stream) return NoStream(symbol, handle);
    if (state.graph && state.capturing.count(stream.get())) {
      state.graph->tasks.push_back(std::move(task));
      return kSuccess;
    }
    if (IsLate()) {
      stream->queue.push_back({std::move(task), nullptr, 0, false});
      return kSuccess;
    }
  }
  return task();
}

int OnStreamInTurn(const char* symbol, void* handle, Task task) {
  State& state = GetState();
  {
    const Lock lock(state.mutex);
    const auto stream = FindStream(handle);
    if (stream && IsLate() && !state.capturing.count(stream.get())) {
      if (state.last_turn) stream->queue.push_back({nullptr, state.last_turn, 1, true});
      stream->queue.push_back({std::move(task), nullptr, 0, false});
      auto turn = std::make_shared<EventState>();
      turn->stream = stream;
      turn->recorded = 1;
      stream->queue.push_back({nullptr, turn, 1, false});
      state.last_turn = std::move(turn);
      return kSuccess;
    }
  }
  return OnStream(symbol, handle, std::move(task));
}

int FinishStream(const char* symbol, void* handle) {
  if (const int code = QueueFailure(symbol)) return code;
  State& state = GetState();
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
  for (const auto& stream : Streams(-1)) Work(stream, nullptr, 0);
}

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

// A stream with work left says so, and does it: whoever asks until it is done gets there.
int aclrtStreamQuery(void* handle, int* status) {
  CANN_HOST_CALL(aclrtStreamQuery);
  CANN_HOST_NEEDS(aclrtStreamQuery, status);
  bool idle = false;
  {
    const Lock lock(GetState().mutex);
    const auto stream = FindStream(handle);
    if (!stream) return NoStream("aclrtStreamQuery", handle);
    idle = stream->queue.empty();
  }
  *status = idle ? 0 : 1;
  return FinishStream("aclrtStreamQuery", handle);
}

int aclrtStreamGetId(void* handle, int32_t* id) {
  CANN_HOST_CALL(aclrtStreamGetId);
  CANN_HOST_NEEDS(aclrtStreamGetId, id);
  const Lock lock(GetState().mutex);
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
  const Lock lock(GetState().mutex);
  const auto stream = FindStream(handle);
  if (!stream) return NoStream("aclrtSetStreamOverflowSwitch", handle);
  stream->overflow_switch = flag;
  return kSuccess;
}

int aclrtGetStreamOverflowSwitch(void* handle, uint32_t* flag) {
  CANN_HOST_CALL(aclrtGetStreamOverflowSwitch);
  CANN_HOST_NEEDS(aclrtGetStreamOverflowSwitch, flag);
  const Lock lock(GetState().mutex);
  const auto stream = FindStream(handle);
  if (!stream) return NoStream("aclrtGetStreamOverflowSwitch", handle);
  *flag = stream->overflow_switch;
  return kSuccess;
}

#undef GROUP
#define GROUP "Events"

int aclrtCreateEventWithFlag(void** event, uint32_t) {
  CANN_HOST_CALL(aclrtCreateEventWithFlag);
  return NewEvent("aclrtCreateEventWithFlag", event);
}
int aclrtCreateEventExWithFlag(void** event, uint32_t) {
  CANN_HOST_CALL(aclrtCreateEventExWithFlag);
  return NewEvent("aclrtCreateEventExWithFlag", event);
}

int aclrtDestroyEvent(void* event) {
  CANN_HOST_CALL(aclrtDestroyEvent);
  const Lock lock(GetState().mutex);
  return GetState().events.erase(event) ? +kSuccess : NoEvent("aclrtDestroyEvent", event);
}

int aclrtRecordEvent(void* handle, void* on) {
  CANN_HOST_CALL(aclrtRecordEvent);
  State& state = GetState();
  const Lock lock(state.mutex);
  const auto event = FindEvent(handle);
  const auto stream = FindStream(on);
  if (!event) return NoEvent("aclrtRecordEvent", handle);
  if (!stream) return NoStream("aclrtRecordEvent", on);
  // In a capture it marks a place in the graph, not in time.
  event->captured = state.capturing.count(stream.get()) != 0;
  if (event->captured) return kSuccess;
  event->stream = stream;
  const uint64_t number = ++event->recorded;
  if (IsLate()) {
    stream->queue.push_back({nullptr, event, number, false});
  } else {
    event->time = Clock::now();
    event->done = number;
  }
  return kSuccess;
}

int aclrtResetEvent(void* handle, void*) {
  CANN_HOST_CALL(aclrtResetEvent);
  const Lock lock(GetState().mutex);
  const auto event = FindEvent(handle);
  if (!event) return NoEvent("aclrtResetEvent", handle);
  event->recorded = event->done = 0;
  return kSuccess;
}

// An event that was never recorded is complete, as in CANN. See aclrtStreamQuery for the others.
int aclrtQueryEventStatus(void* event, int* status) {
  CANN_HOST_CALL(aclrtQueryEventStatus);
  CANN_HOST_NEEDS(aclrtQueryEventStatus, status);
  bool done = false;
  if (!FinishEvent("aclrtQueryEventStatus", event, &done)) return kInvalidParam;
  *status = done ? 1 : 0;  // ACL_EVENT_RECORDED_STATUS_COMPLETE, _NOT_READY
  return kSuccess;
}

int aclrtQueryEventWaitStatus(void* event, int* status) {
  CANN_HOST_CALL(aclrtQueryEventWaitStatus);
  CANN_HOST_NEEDS(aclrtQueryEventWaitStatus, status);
  bool done = false;
  if (!FinishEvent("aclrtQueryEventWaitStatus", event, &done)) return kInvalidParam;
  *status = done ? 0 : 1;  // ACL_EVENT_WAIT_STATUS_COMPLETE, _NOT_READY
  return kSuccess;
}

int aclrtSynchronizeEvent(void* event) {
  CANN_HOST_CALL(aclrtSynchronizeEvent);
  bool done = false;
  return FinishEvent("aclrtSynchronizeEvent", event, &done) ? kSuccess : kInvalidParam;
}

int aclrtStreamWaitEvent(void* on, void* handle) {
  CANN_HOST_CALL(aclrtStreamWaitEvent);
  State& state = GetState();
  const Lock lock(state.mutex);
  const auto event = FindEvent(handle);
  const auto stream = FindStream(on);
  if (!event) return NoEvent("aclrtStreamWaitEvent", handle);
  if (!stream) return NoStream("aclrtStreamWaitEvent", on);
  if (state.graph && event->captured) {
    state.capturing.insert(stream.get());  // work that follows captured work is captured too
  } else if (IsLate() && event->done < event->recorded) {
    stream->queue.push_back({nullptr, event, event->recorded, true});
  }
  return kSuccess;
}

int aclrtEventElapsedTime(float* milliseconds, void* start, void* end) {
  CANN_HOST_CALL(aclrtEventElapsedTime);
  CANN_HOST_NEEDS(aclrtEventElapsedTime, milliseconds);
  const Lock lock(GetState().mutex);
  const auto first = FindEvent(start);
  const auto last = FindEvent(end);
  if (!first || !last) return NoEvent("aclrtEventElapsedTime", first ? end : start);
  if (!first->done || !last->done || first->done < first->recorded ||
      last->done < last->recorded) {
    return Fail(kInvalidParam, "aclrtEventElapsedTime: an event was not recorded, or is not done");
  }
  *milliseconds = std::chrono::duration<float, std::milli>(last->time - first->time).count();
  return kSuccess;
}

int aclrtEventGetTimestamp(void* handle, uint64_t* timestamp) {
  CANN_HOST_CALL(aclrtEventGetTimestamp);
  CANN_HOST_NEEDS(aclrtEventGetTimestamp, timestamp);
  const Lock lock(GetState().mutex);
  const auto event = FindEvent(handle);
  if (!event) return NoEvent("aclrtEventGetTimestamp", handle);
  *timestamp = std::chrono::duration_cast<std::chrono::microseconds>(event->time.time_since_epoch())
                   .count();
  return kSuccess;
}

#undef GROUP
#define GROUP "Captured graphs"

int aclmdlRICaptureBegin(void* handle, int) {
  CANN_HOST_CALL(aclmdlRICaptureBegin);
  State& state = GetState();
  const Lock lock(state.mutex);
  const auto stream = FindStream(handle);
  if (!stream) return NoStream("aclmdlRICaptureBegin", handle);
  if (state.graph) {
    return Fail(kFailure, "aclmdlRICaptureBegin: cann_host captures one graph at a time");
  }
  state.graph = std::make_unique<Captured>();
  state.capturing = {stream.get()};
  is_capturing = true;
  return kSuccess;
}

int aclmdlRICaptureGetInfo(void* handle, int* status, void** model) {
  CANN_HOST_CALL(aclmdlRICaptureGetInfo);
  State& state = GetState();
  const Lock lock(state.mutex);
  const auto stream = FindStream(handle);
  if (!stream) return NoStream("aclmdlRICaptureGetInfo", handle);
  const bool active = state.capturing.count(stream.get()) != 0;
  if (status != nullptr) *status = active ? 1 : 0;
  if (model != nullptr) *model = active ? state.graph.get() : nullptr;
  return kSuccess;
}

int aclmdlRICaptureEnd(void* handle, void** model) {
  CANN_HOST_CALL(aclmdlRICaptureEnd);
  State& state = GetState();
  const Lock lock(state.mutex);
  const auto stream = FindStream(handle);
  if (model == nullptr || !stream || !state.capturing.count(stream.get())) {
    return Fail(kInvalidParam, "aclmdlRICaptureEnd: no capture was begun on this stream");
  }
  *model = state.graph.get();
  state.graphs[*model] = std::move(state.graph);
  state.capturing.clear();
  is_capturing = false;
  return kSuccess;
}

int aclmdlRICaptureThreadExchangeMode(int*) {
  CANN_HOST_CALL(aclmdlRICaptureThreadExchangeMode);
  return kSuccess;
}

int aclmdlRIExecuteAsync(void* model, void* stream) {
  CANN_HOST_CALL(aclmdlRIExecuteAsync);
  std::shared_ptr<const Captured> graph;
  {
    const Lock lock(GetState().mutex);
    const auto found = GetState().graphs.find(model);
    if (found == GetState().graphs.end()) {
      return Fail(kInvalidParam, "aclmdlRIExecuteAsync: %p is no captured graph", model);
    }
    graph = found->second;
  }
  return OnStream("aclmdlRIExecuteAsync", stream, [graph] {
    for (const auto& task : graph->tasks) {
      if (const int code = task()) return code;
    }
    return +kSuccess;
  });
}

int aclmdlRIDestroy(void* model) {
  CANN_HOST_CALL(aclmdlRIDestroy);
  const Lock lock(GetState().mutex);
  if (GetState().graphs.erase(model)) return kSuccess;
  return Fail(kInvalidParam, "aclmdlRIDestroy: %p is no captured graph", model);
}

// A hint to keep operator descriptions for later updates, which there are none of here.
int aclrtSetStreamAttribute(void*, int, void*) {
  CANN_HOST_CALL(aclrtSetStreamAttribute);
  return kSuccess;
}

void cann_host_leave() { is_leaving = true; }

int cann_host_has_task_queue() { return has_task_queue ? 1 : 0; }

// Whether a capture is on, on whatever stream.
int cann_host_is_capturing() { return is_capturing ? 1 : 0; }

// Whether it is on this stream.
int cann_host_captures(void* handle) {
  State& state = GetState();
  const Lock lock(state.mutex);
  return state.graph && state.capturing.count(FindStream(handle).get()) ? 1 : 0;
}

// Python's side of replays: a function of the number; null when the interpreter is about to end.
void cann_host_set_replay(void* replay) { replay_in_python.Set(replay); }

// Adds work of Python's to what the stream captures: at each replay it is asked for by its number.
int cann_host_record(void* stream, int64_t number) {
  return OnStream("cann_host_record", stream, [work = std::make_shared<Recorded>(number)] {
    return replay_in_python.Call("replay", kFailure, "(L)", static_cast<long long>(work->number));
  });
}

// A number that no graph has any more, -1 if there is none.
int64_t cann_host_next_ended() {
  const Lock lock(ended.mutex);
  if (ended.numbers.empty()) return -1;
  const int64_t number = ended.numbers.back();
  ended.numbers.pop_back();
  return number;
}

}  // extern "C"
