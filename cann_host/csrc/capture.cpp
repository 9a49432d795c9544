// libascendcl: captured graphs (aclgraph). Work that is launched on a captured stream is recorded, and
// done at each replay.
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
    const Lock lock(GetStreams().mutex);
    const auto found = GetStreams().graphs.find(model);
    if (found == GetStreams().graphs.end()) {
      return Fail(kInvalidParam, "aclmdlRIExecuteAsync: %p is not a captured graph", model);
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
  const Lock lock(GetStreams().mutex);
  if (GetStreams().graphs.erase(model)) return kSuccess;
  return Fail(kInvalidParam, "aclmdlRIDestroy: %p is not a captured graph", model);
}

// A hint to keep operator descriptions for later updates. There are no updates here.
int aclrtSetStreamAttribute(void*, int, void*) {
  CANN_HOST_CALL(aclrtSetStreamAttribute);
  return kSuccess;
}

// Whether this stream is being captured.
int cann_host_captures(void* handle) {
  StreamsState& state = GetStreams();
  const Lock lock(state.mutex);
  return state.graph && state.capturing.count(FindStream(handle).get()) ? 1 : 0;
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
