#include "python.h"

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "core.h"

namespace cann_host {
namespace {

struct Api : Python {
  int (*is_initialized)();
  void* (*this_thread)();
  long (*as_long)(void*);
  void* (*occurred)();
  void (*fetch)(void**, void**, void**);
  void (*normalize)(void**, void**, void**);
  int (*set_traceback)(void*, void*);
  void* (*type_of)(void*);
  void (*set_object)(void*, void*);
  void* (*attribute)(void*, const char*);
  const char* (*text)(void*);
  void (*forget)(void*);
  int (*add_pending)(int (*)(void*), void*);
  int (*make_pending)();
  unsigned long (*thread_number)();
  int (*set_async)(unsigned long, void*);
  bool is_whole;

  Api() {
    is_whole = Find(ensure, "PyGILState_Ensure") && Find(release, "PyGILState_Release") &&
               Find(call, "PyObject_CallFunction") && Find(is_initialized, "Py_IsInitialized") &&
               Find(this_thread, "PyGILState_GetThisThreadState") &&
               Find(as_long, "PyLong_AsLong") && Find(occurred, "PyErr_Occurred") &&
               Find(fetch, "PyErr_Fetch") && Find(normalize, "PyErr_NormalizeException") &&
               Find(set_traceback, "PyException_SetTraceback") && Find(type_of, "PyObject_Type") &&
               Find(set_object, "PyErr_SetObject") && Find(attribute, "PyObject_GetAttrString") &&
               Find(text, "PyUnicode_AsUTF8") && Find(forget, "Py_DecRef") &&
               Find(add_pending, "Py_AddPendingCall") &&
               Find(make_pending, "Py_MakePendingCalls") &&
               Find(thread_number, "PyThread_get_thread_ident") &&
               Find(set_async, "PyThreadState_SetAsyncExc");
  }

  template <typename F>
  static bool Find(F& function, const char* name) {
    function = reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name));
    return function != nullptr;
  }
};

const Api* GetApi() {
  static const Api* api = new Api;
  return api->is_whole && api->is_initialized() ? api : nullptr;
}

// The main thread does this when it is back in Python.
int RaiseNow(void* exception) {
  const Api* api = GetApi();
  void* type = api->type_of(exception);
  api->set_object(type, exception);
  api->forget(type);
  api->forget(exception);
  return -1;
}

// The ids of the main thread and of this one, read once, and again after a fork.
std::atomic<long> main_thread{getpid()};
thread_local long this_thread = 0;

bool IsMainThread() {
  if (this_thread == 0) this_thread = syscall(SYS_gettid);
  return this_thread == main_thread;
}

// Clears the exception that is set and returns it.
void* TakeException(const Api& api) {
  void *type = nullptr, *exception = nullptr, *trace = nullptr;
  api.fetch(&type, &exception, &trace);
  api.normalize(&type, &exception, &trace);
  if (trace != nullptr) {
    api.set_traceback(exception, trace);
    api.forget(trace);
  }
  api.forget(type);
  return exception;
}

// Takes the exception. In the main thread, where signals are handled, this exception is raised; in
// another thread, a new exception of its class.
void RaiseLater(const Api& api, void* exception) {
  if (IsMainThread()) {
    if (api.add_pending(RaiseNow, exception) == 0) return;
  } else {
    void* type = api.type_of(exception);
    api.set_async(api.thread_number(), type);
    api.forget(type);
  }
  api.forget(exception);
}

// The signals whose handlers may raise: Ctrl-C, the end of a job, a time limit.
struct Held {
  int signal;
  struct sigaction before;
  bool is_held;
  std::atomic<int> came;
};
Held held_signals[] = {
    {SIGINT, {}, false, {0}}, {SIGTERM, {}, false, {0}}, {SIGALRM, {}, false, {0}}};
int depth = 0;  // of the main thread

void Hold(int signal) {
  for (Held& held : held_signals) {
    if (held.signal == signal && held.came.fetch_add(1) > 0) held.before.sa_handler(signal);
  }
}

void GiveBack() {
  for (Held& held : held_signals) {
    if (held.is_held) sigaction(held.signal, &held.before, nullptr);
  }
}

// The main thread of a child is the thread that forked; it may not be in a Python function.
struct HeldAtFork {
  HeldAtFork() {
    pthread_atfork([] { is_main = IsMainThread(); }, nullptr,
                   [] {
                     main_thread = getpid();
                     this_thread = 0;
                     if (is_main || depth == 0) return;
                     depth = 0;
                     GiveBack();
                   });
  }
  static inline bool is_main = true;
};
const HeldAtFork held_at_fork;

}  // namespace

HeldSignals::HeldSignals() : holds_(IsMainThread() && depth++ == 0) {
  if (!holds_) return;
  for (Held& held : held_signals) {
    held.came = 0;
    struct sigaction now;
    held.is_held = sigaction(held.signal, nullptr, &held.before) == 0 &&
                   held.before.sa_handler != SIG_DFL && held.before.sa_handler != SIG_IGN &&
                   !(held.before.sa_flags & SA_SIGINFO);
    now = held.before;
    now.sa_handler = Hold;
    if (held.is_held) sigaction(held.signal, &now, nullptr);
  }
  // a signal that came just before is handled now; its exception waits too
  const Api& api = *GetApi();
  if (api.make_pending() != 0) exception_ = TakeException(api);
}

HeldSignals::~HeldSignals() {
  if (!holds_) {
    if (IsMainThread()) --depth;
    return;
  }
  --depth;
  GiveBack();
  for (Held& held : held_signals) {
    if (held.is_held && held.came == 1) held.before.sa_handler(held.signal);
  }
  if (exception_ != nullptr) RaiseLater(*GetApi(), exception_);
}

const Python* GetPython() { return GetApi(); }

bool IsPythonThread() {
  const Api* api = GetApi();
  return api != nullptr && api->this_thread() != nullptr;
}

int PythonFunction::NotThere(const char* name, int failure) {
  return Fail(failure,
              "%s: cann_host is not active in this process, or its interpreter is about to end",
              name);
}

int PythonFunction::Finish(const char* name, int failure, void* result, bool knows_thread) {
  const Api& api = *GetApi();
  if (result != nullptr) {
    const long code = api.as_long(result);
    api.forget(result);
    if (code != -1 || api.occurred() == nullptr) return static_cast<int>(code);
  }
  void* exception = TakeException(api);
  void* type = api.type_of(exception);
  void* called = api.attribute(type, "__name__");
  Fail(failure, "%s: cann_host was interrupted by %s", name,
       called ? api.text(called) : "an exception");
  if (called != nullptr) api.forget(called);
  api.forget(type);
  if (knows_thread) {
    RaiseLater(api, exception);
  } else {
    api.forget(exception);
  }
  return failure;
}

}  // namespace cann_host
