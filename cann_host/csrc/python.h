// Python functions that this library calls. It is not linked to Python, whose functions are found at
// run time.
#pragma once

#include <atomic>

namespace cann_host {

// What is used of Python's C interface.
struct Python {
  int (*ensure)();
  void (*release)(int);
  void* (*call)(void* function, const char* format, ...);
};

// Null if there is no Python in this process, or not any more.
const Python* GetPython();

// Whether Python knows this thread. torch_npu's threads it does not.
bool IsPythonThread();

// A function of Python's that returns a code, 0 for success.
//
// What it does not catch reaches the caller, which C++ between them cannot carry: a Ctrl-C raises
// KeyboardInterrupt inside whatever Python function is running. The call fails with a text, and the
// exception is raised again in this thread as soon as it is back in Python. (A ctypes callback would
// drop an exception, and return success.)
class PythonFunction {
 public:
  // The object must live as long as the process; null takes it away.
  void Set(void* function) { function_ = function; }
  explicit operator bool() const { return function_ != nullptr; }

  // `format` and arguments are those of PyObject_CallFunction, parentheses included. Returns
  // `failure`, with the reason kept under the name, if it could not be called or did not return.
  template <typename... Arguments>
  int Call(const char* name, int failure, const char* format, Arguments... arguments) const {
    void* function = function_;
    const Python* python = GetPython();
    if (function == nullptr || python == nullptr) return NotThere(name, failure);
    const bool knows_thread = IsPythonThread();
    const int state = python->ensure();
    const int code =
        Finish(name, failure, python->call(function, format, arguments...), knows_thread);
    python->release(state);
    return code;
  }

 private:
  static int NotThere(const char* name, int failure);
  static int Finish(const char* name, int failure, void* result, bool knows_thread);

  std::atomic<void*> function_{nullptr};
};

}  // namespace cann_host
