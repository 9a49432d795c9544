// Captured graphs (aclmdlRI*): between Begin and End, what is launched on the stream is kept instead
// of run; Execute runs it, as often as asked. One capture at a time.
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "core.h"

namespace cann_host {
namespace {

enum Status : int { kNone = 0, kActive = 1 };

struct Captured {
  std::vector<Task> tasks;
};

struct Capture {
  std::mutex mutex;
  std::unique_ptr<Captured> graph;
  void* stream = nullptr;
};

Capture& GetCapture() {
  static Capture* capture = new Capture;  // leaked: see core.cpp
  return *capture;
}

}  // namespace

int RunOrCapture(void* stream, Task task) {
  {
    Capture& capture = GetCapture();
    std::lock_guard<std::mutex> lock(capture.mutex);
    if (capture.graph && capture.stream == stream) {
      capture.graph->tasks.push_back(std::move(task));
      return kSuccess;
    }
  }
  return task();
}

}  // namespace cann_host

using cann_host::Captured;
using cann_host::Fail;
using cann_host::GetCapture;
using cann_host::kFailure;
using cann_host::kInvalidParam;
using cann_host::kSuccess;

extern "C" {

int aclmdlRICaptureBegin(void* stream, int) {
  auto& capture = GetCapture();
  std::lock_guard<std::mutex> lock(capture.mutex);
  if (capture.graph) {
    return Fail(kFailure, "aclmdlRICaptureBegin: cann_host captures one graph at a time");
  }
  capture.graph = std::make_unique<Captured>();
  capture.stream = stream;
  return kSuccess;
}

int aclmdlRICaptureGetInfo(void* stream, int* status, void** model) {
  auto& capture = GetCapture();
  std::lock_guard<std::mutex> lock(capture.mutex);
  const bool active = capture.graph && capture.stream == stream;
  if (status != nullptr) *status = active ? cann_host::kActive : cann_host::kNone;
  if (model != nullptr) *model = active ? capture.graph.get() : nullptr;
  return kSuccess;
}

int aclmdlRICaptureEnd(void* stream, void** model) {
  auto& capture = GetCapture();
  std::lock_guard<std::mutex> lock(capture.mutex);
  if (model == nullptr || !capture.graph || capture.stream != stream) {
    return Fail(kInvalidParam, "aclmdlRICaptureEnd: no capture was begun on this stream");
  }
  *model = capture.graph.release();
  capture.stream = nullptr;
  return kSuccess;
}

int aclmdlRICaptureThreadExchangeMode(int*) { return kSuccess; }

int aclmdlRIExecuteAsync(void* model, void*) {
  if (model == nullptr) return Fail(kInvalidParam, "aclmdlRIExecuteAsync: no graph");
  for (const auto& task : static_cast<Captured*>(model)->tasks) {
    const int code = task();
    if (code != kSuccess) return code;
  }
  return kSuccess;
}

int aclmdlRIDestroy(void* model) {
  delete static_cast<Captured*>(model);
  return kSuccess;
}

// A hint to keep operator descriptions for later updates, which there are none of here.
int aclrtSetStreamAttribute(void*, int, void*) { return kSuccess; }

// Whether a capture is on: Python's CPU kernels cannot be captured.
int cann_host_is_capturing() {
  auto& capture = GetCapture();
  std::lock_guard<std::mutex> lock(capture.mutex);
  return capture.graph ? 1 : 0;
}

}  // extern "C"
