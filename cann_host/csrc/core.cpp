#include "core.h"

#include <cstdarg>
#include <cstdio>
#include <mutex>
#include <string>

namespace cann_host {
namespace {

// Leaked on purpose: torch_npu still calls in while the process runs its static destructors.
struct State {
  std::mutex mutex;
  std::string error;
  std::string soc = "Ascend910B2";
};

State& GetState() {
  static State* state = new State;
  return *state;
}

void Keep(const char* text) {
  State& state = GetState();
  std::lock_guard<std::mutex> lock(state.mutex);
  state.error = text;
}

}  // namespace

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

// One text for the whole process, not one per thread: graphs are compiled on one thread and the
// failure is reported by another.
const char* RecentError() {
  thread_local std::string copy;
  State& state = GetState();
  std::lock_guard<std::mutex> lock(state.mutex);
  copy = state.error;
  return copy.c_str();
}

const char* CannVersion() { return "9.1.0"; }

const char* SocName() { return GetState().soc.c_str(); }

}  // namespace cann_host

// Called once by Python, before anything asks for the name.
extern "C" void cann_host_set_soc(const char* name) { cann_host::GetState().soc = name; }

// Python kernels report their own failures through this.
extern "C" void cann_host_set_error(const char* text) { cann_host::Keep(text); }

extern "C" const char* cann_host_recent_error() { return cann_host::RecentError(); }
