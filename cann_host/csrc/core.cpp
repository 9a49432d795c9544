#include "core.h"

#include <sys/prctl.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <vector>

#include "bindings.h"

namespace cann_host {
namespace {

struct Wanted {
  std::string symbol;
  int code;
  std::string text;
  long call;  // the one that fails, from 1; 0 for every one
  long calls;
};

// Leaked on purpose: torch_npu still calls in while the process runs its static destructors.
struct State {
  Mutex mutex;
  std::string error;
  Options options;
  std::vector<Wanted> faults;
  std::string queue_failure;  // of torch_npu's task queue
};

State& GetState() {
  static State* state = new State;
  return *state;
}
// Made when the library is loaded, so that no fork finds it half made. Other files do the same.
[[maybe_unused]] State& made = GetState();

std::atomic<bool> has_faults{false};
std::atomic<bool> queue_has_failed{false};

// torch_npu gives its threads names.
bool IsTaskQueue() {
  thread_local const bool is_it = [] {
    char name[16] = "";
    return prctl(PR_GET_NAME, name) == 0 && std::strcmp(name, "acl_thread") == 0;
  }();
  return is_it;
}

void Keep(const char* text) {
  State& state = GetState();
  const Lock lock(state.mutex);
  state.error = text;
}

}  // namespace

const Options& GetOptions() { return GetState().options; }

int Fail(int code, const char* fmt, ...) {
  char text[4096];
  va_list args;
  va_start(args, fmt);
  std::vsnprintf(text, sizeof(text), fmt, args);
  va_end(args);
  Keep(text);
  return code;
}

int Unimplemented(const char* symbol) {
  return Fail(kFeatureUnsupported,
              "cann_host: %s is not implemented by this stand-in for CANN (it computes on the CPU; "
              "there is no NPU here)",
              symbol);
}

namespace {

// The caller holds the lock.
void NoteFailure(State& state) {
  if (!IsTaskQueue() || queue_has_failed) return;
  state.queue_failure = state.error;
  queue_has_failed = true;
}

}  // namespace

int ReportLaunch(int code) {
  if (code != kSuccess && IsTaskQueue()) {
    State& state = GetState();
    const Lock lock(state.mutex);
    NoteFailure(state);
  }
  return code;
}

int QueueFailure(const char* symbol) {
  if (!queue_has_failed) return kSuccess;
  std::string reason;
  {
    State& state = GetState();
    const Lock lock(state.mutex);
    reason = state.queue_failure;
  }
  return Fail(
      kFailure,
      "%s: cann_host: a launch on torch_npu's task queue has failed, and torch_npu drops all "
      "later launches: do not trust any results. Start the process again; with "
      "TASK_QUEUE_ENABLE=0 the call that fails raises the error. The failure: %s",
      symbol, reason.c_str());
}

bool QueueHasFailed() { return queue_has_failed; }

int Fault(const char* symbol) {
  if (!has_faults.load(std::memory_order_relaxed)) return kSuccess;
  State& state = GetState();
  const Lock lock(state.mutex);
  for (Wanted& wanted : state.faults) {
    if (wanted.symbol != symbol) continue;
    ++wanted.calls;
    if (wanted.call != 0 && wanted.call != wanted.calls) continue;
    state.error = wanted.text + ": cann_host: this fault was asked for: call " +
                  std::to_string(wanted.calls) + " of " + symbol;
    const int code = wanted.code;
    NoteFailure(state);
    return code;
  }
  return kSuccess;
}

int64_t DtypeBytes(int dtype) {
  switch (dtype) {
    case 2:   // int8
    case 4:   // uint8
    case 12:  // bool
    case 35:  // float8_e5m2
    case 36:  // float8_e4m3fn
      return 1;
    case 1:   // float16
    case 6:   // int16
    case 7:   // uint16
    case 27:  // bfloat16
      return 2;
    case 0:   // float32
    case 3:   // int32
    case 8:   // uint32
    case 33:  // complex32
      return 4;
    case 9:   // int64
    case 10:  // uint64
    case 11:  // float64
    case 16:  // complex64
      return 8;
    case 17:  // complex128
      return 16;
    default:
      return 0;
  }
}

// One text for the whole process, not one per thread: graphs are compiled on one thread and the
// failure is reported by another.
const char* RecentError() {
  thread_local std::string copy;
  State& state = GetState();
  const Lock lock(state.mutex);
  copy = state.error;
  return copy.c_str();
}

}  // namespace cann_host

using cann_host::GetState;

// Begin and end of the section; the linker names them after it.
extern "C" const cann_host::Entry* const __start_cann_host_entries[];
extern "C" const cann_host::Entry* const __stop_cann_host_entries[];

extern "C" {

// Called once by Python, before anything reads the options.
void cann_host_configure(const char* soc, const char* cann_version, int devices, uint64_t memory,
                         int late_streams, int fill) {
  GetState().options = {soc, cann_version, devices, static_cast<size_t>(memory), late_streams != 0,
                        fill};
}

// From now on, call number `call` of the symbol returns this code; every call, if it is 0.
void cann_host_add_fault(const char* symbol, int code, const char* text, long call) {
  auto& state = GetState();
  const cann_host::Lock lock(state.mutex);
  state.faults.push_back({symbol, code, text, call, 0});
  cann_host::has_faults = true;
}

// Drops all faults but the first `keep`.
void cann_host_drop_faults(size_t keep) {
  auto& state = GetState();
  const cann_host::Lock lock(state.mutex);
  if (keep < state.faults.size()) state.faults.resize(keep);
  cann_host::has_faults = !state.faults.empty();
}

// "group\tsymbol\tkind\n" for each function of CANN that this library has.
const char* cann_host_entries() {
  static const std::string* list = [] {
    auto* text = new std::string;
    for (auto entry = __start_cann_host_entries; entry != __stop_cann_host_entries; ++entry) {
      *text +=
          std::string((*entry)->group) + "\t" + (*entry)->symbol + "\t" + (*entry)->kind + "\n";
    }
    return text;
  }();
  return list->c_str();
}

// Python kernels report their own failures through this.
void cann_host_set_error(const char* text) { cann_host::Keep(text); }

const char* cann_host_recent_error() { return cann_host::RecentError(); }

}  // extern "C"
