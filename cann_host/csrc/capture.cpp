// libascendcl: captured graphs (aclgraph). Work that is launched on a captured stream is recorded, and
// done at each replay.
#include <algorithm>
#include <utility>

#include "bindings.h"
#include "python.h"
#include "stream.h"

namespace cann_host {

std::atomic<bool> is_capturing{false};

namespace {

// Python's work in a captured graph has a number. When the graph is destroyed, the number is stored
// here, and Python reads it later: the thread that destroys a graph may hold locks that Python's
// threads wait for.
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

}  // namespace
}  // namespace cann_host

using namespace cann_host;

extern "C" {

#define GROUP "Captured graphs"

int aclmdlRICaptureBegin(void* handle, int) {
  CANN_HOST_CALL(aclmdlRICaptureBegin);
  StreamsState& state = GetStreams();
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
  StreamsState& state = GetStreams();
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
  StreamsState& state = GetStreams();
  const Lock lock(state.mutex);
  const auto stream = FindStream(handle);
  if (model == nullptr || !stream || !state.capturing.count(stream.get())) {
    return Fail(kInvalidParam, "aclmdlRICaptureEnd: no capture was begun on this stream");
  }
  const bool is_whole = state.grouping.empty();
  if (is_whole) {
    *model = state.graph.get();
    state.graphs[*model] = std::move(state.graph);
  }
  state.graph.reset();
  state.grouping.clear();
  state.capturing.clear();
  is_capturing = !state.updating.empty();
  if (is_whole) return kSuccess;
  return Fail(kInvalidParam, "aclmdlRICaptureEnd: a group of tasks was begun and not ended");
}

int aclmdlRICaptureThreadExchangeMode(int*) {
  CANN_HOST_CALL(aclmdlRICaptureThreadExchangeMode);
  return kSuccess;
}

int aclmdlRIExecuteAsync(void* model, void* stream) {
  CANN_HOST_CALL(aclmdlRIExecuteAsync);
  std::shared_ptr<const Captured> graph;
  {
    const Lock lock(GetStreams().mutex);
    const auto found = GetStreams().graphs.find(model);
    if (found == GetStreams().graphs.end()) {
      return Fail(kInvalidParam, "aclmdlRIExecuteAsync: %p is not a captured graph", model);
    }
    graph = found->second;
  }
  // With waits for values, which exist only where work is late, the items stand in the stream's queue.
  const auto& items = graph->items;
  const auto is_task = [](const Item& item) { return item.does == Item::Does::kTask; };
  if (std::all_of(items.begin(), items.end(), is_task)) {
    return OnStream("aclmdlRIExecuteAsync", stream, [graph] {
      for (const Item& item : graph->items) {
        if (const int code = item.task()) return code;
      }
      return +kSuccess;
    });
  }
  StreamsState& state = GetStreams();
  const Lock lock(state.mutex);
  const auto found = FindStream(stream);
  if (!found) return NoStream("aclmdlRIExecuteAsync", stream);
  if (state.capturing.count(found.get())) {
    return Fail(
        kFailure,
        "aclmdlRIExecuteAsync: cann_host does not capture the replay of a graph that waits for "
        "external events");
  }
  found->queue.insert(found->queue.end(), graph->items.begin(), graph->items.end());
  return kSuccess;
}

int aclmdlRIDestroy(void* model) {
  CANN_HOST_CALL(aclmdlRIDestroy);
  StreamsState& state = GetStreams();
  const Lock lock(state.mutex);
  const auto found = state.graphs.find(model);
  if (found == state.graphs.end()) {
    return Fail(kInvalidParam, "aclmdlRIDestroy: %p is not a captured graph", model);
  }
  for (const auto& group : found->second->groups) state.groups.erase(group.get());
  state.graphs.erase(found);
  return kSuccess;
}

// ---- groups of tasks, which the program can replace between replays ----

int aclmdlRICaptureTaskGrpBegin(void* handle) {
  CANN_HOST_CALL(aclmdlRICaptureTaskGrpBegin);
  StreamsState& state = GetStreams();
  const Lock lock(state.mutex);
  const auto stream = FindStream(handle);
  if (!stream || !state.capturing.count(stream.get()) || state.grouping.count(stream.get())) {
    return Fail(
        kInvalidParam,
        "aclmdlRICaptureTaskGrpBegin: the stream is not being captured, or has an open group");
  }
  state.grouping[stream.get()] = std::make_shared<TaskGroup>();
  return kSuccess;
}

int aclmdlRICaptureTaskGrpEnd(void* handle, void** out) {
  CANN_HOST_CALL(aclmdlRICaptureTaskGrpEnd);
  CANN_HOST_NEEDS(aclmdlRICaptureTaskGrpEnd, out);
  StreamsState& state = GetStreams();
  const Lock lock(state.mutex);
  const auto open = state.grouping.find(FindStream(handle).get());
  if (open == state.grouping.end()) {
    return Fail(kInvalidParam, "aclmdlRICaptureTaskGrpEnd: no group was begun on this stream");
  }
  const auto group = open->second;
  state.grouping.erase(open);
  const auto work = [group] {
    std::vector<Task> tasks;
    {
      const Lock inner(GetStreams().mutex);
      tasks = group->tasks;
    }
    for (const auto& task : tasks) {
      if (const int code = task()) return code;
    }
    return +kSuccess;
  };
  state.graph->items.push_back({Item::Does::kTask, work});
  state.graph->groups.push_back(group);
  state.groups[group.get()] = group;
  *out = group.get();
  return kSuccess;
}

int aclmdlRICaptureTaskUpdateBegin(void* handle, void* group) {
  CANN_HOST_CALL(aclmdlRICaptureTaskUpdateBegin);
  StreamsState& state = GetStreams();
  const Lock lock(state.mutex);
  const auto stream = FindStream(handle);
  if (!stream || state.capturing.count(stream.get()) || state.updating.count(stream.get())) {
    return Fail(kInvalidParam,
                "aclmdlRICaptureTaskUpdateBegin: %p is no stream, or it is being captured, or an "
                "update was begun on it",
                handle);
  }
  const auto found = state.groups.find(group);
  const auto tasks = found == state.groups.end() ? nullptr : found->second.lock();
  if (!tasks) {
    return Fail(kInvalidParam,
                "aclmdlRICaptureTaskUpdateBegin: %p is not a group of tasks of a captured graph",
                group);
  }
  state.updating[stream.get()] = {tasks, {}};
  is_capturing = true;
  return kSuccess;
}

// The new tasks count from here on in the order of the stream.
int aclmdlRICaptureTaskUpdateEnd(void* handle) {
  CANN_HOST_CALL(aclmdlRICaptureTaskUpdateEnd);
  StreamsState& state = GetStreams();
  Update update;
  {
    const Lock lock(state.mutex);
    const auto found = state.updating.find(FindStream(handle).get());
    if (found == state.updating.end()) {
      return Fail(kInvalidParam,
                  "aclmdlRICaptureTaskUpdateEnd: no update was begun on this stream");
    }
    update = std::move(found->second);
    state.updating.erase(found);
    is_capturing = state.graph != nullptr || !state.updating.empty();
    if (update.tasks.size() != update.group->tasks.size()) {
      return Fail(
          kInvalidParam,
          "aclmdlRICaptureTaskUpdateEnd: the update launched %zu tasks and the group has %zu",
          update.tasks.size(), update.group->tasks.size());
    }
  }
  return OnStream("aclmdlRICaptureTaskUpdateEnd", handle, [update] {
    const Lock lock(GetStreams().mutex);
    update.group->tasks = update.tasks;
    return +kSuccess;
  });
}

// A hint to keep operator descriptions for later updates, which need none here.
int aclrtSetStreamAttribute(void*, int, void*) {
  CANN_HOST_CALL(aclrtSetStreamAttribute);
  return kSuccess;
}

// Whether work that is launched on this stream goes into a graph.
int cann_host_captures(void* handle) {
  StreamsState& state = GetStreams();
  const Lock lock(state.mutex);
  StreamState* stream = FindStream(handle).get();
  return state.capturing.count(stream) || state.updating.count(stream) ? 1 : 0;
}

// The Python function that does the work of a number; null when the interpreter is about to end.
void cann_host_set_replay(void* replay) { replay_in_python.Set(replay); }

// Adds Python's work to the graph that the stream captures. Each replay calls Python with the number.
int cann_host_record(void* stream, int64_t number) {
  return OnStream("cann_host_record", stream, [work = std::make_shared<Recorded>(number)] {
    return replay_in_python.Call("replay", kFailure, "(L)", static_cast<long long>(work->number));
  });
}

// A number whose graph is destroyed, each once; -1 if there is none.
int64_t cann_host_next_ended() {
  const Lock lock(ended.mutex);
  if (ended.numbers.empty()) return -1;
  const int64_t number = ended.numbers.back();
  ended.numbers.pop_back();
  return number;
}

}  // extern "C"
