// Python functions that this library calls. It is not linked to Python, whose functions are found at
// run time.
#pragma once

#include <atomic>

namespace cann_host {

// The functions of Python's C interface that this library uses.
struct Python {
  int (*ensure)();
  void (*release)(int);
  void* (*call)(void* function, const char* format, ...);
};

// Null if there is no Python in this process, or it has ended.
const Python* GetPython();

// Whether Python knows this thread. It does not know torch_npu's threads.
bool IsPythonThread();

// While one of these lives in the main thread, signals that Python handles wait. The caller holds
// Python's lock.
class HeldSignals {
 public:
  HeldSignals();
  ~HeldSignals();
  HeldSignals(const HeldSignals&) = delete;

 private:
  bool holds_;
  void* exception_ = nullptr;  // of a signal that came before
};

// A function of Python's that returns a code, 0 for success.
//
// A Ctrl-C raises KeyboardInterrupt in the Python function that the main thread runs, and the C++
// between that function and its caller cannot pass it on. So the first signal waits until the function
// has returned; a second one does not. If the function raises an exception nevertheless, the call fails
// with a text, and the exception is raised again in this thread when the thread is back in Python. (A
// ctypes callback would drop an exception, and return success.)
class PythonFunction {
 public:
  // The object must live as long as the process; null removes it.
  void Set(void* function) { function_ = function; }
  explicit operator bool() const { return function_ != nullptr; }

  // `format` and arguments are those of PyObject_CallFunction, parentheses included. Returns
  // `failure`, with the reason stored under the name, if it could not be called or did not return.
  template <typename... Arguments>
  int Call(const char* name, int failure, const char* format, Arguments... arguments) const {
    void* function = function_;
    const Python* python = GetPython();
    if (function == nullptr || python == nullptr) return NotThere(name, failure);
    const bool knows_thread = IsPythonThread();
    const int state = python->ensure();
    int code = 0;
    {
      const HeldSignals held;
      code = Finish(name, failure, python->call(function, format, arguments...), knows_thread);
    }
    python->release(state);
    return code;
  }

 private:
  static int NotThere(const char* name, int failure);
  static int Finish(const char* name, int failure, void* result, bool knows_thread);

  std::atomic<void*> function_{nullptr};
};

}  // namespace cann_host
