// libascendcl: events.
#include "stream.h"

namespace cann_host {

std::shared_ptr<EventState> FindEvent(void* handle) {
  const auto found = GetStreams().events.find(handle);
  return found == GetStreams().events.end() ? nullptr : found->second;
}

int NoEvent(const char* symbol, void* handle) {
  return Fail(kInvalidParam, "%s: %p is not an event", symbol, handle);
}

namespace {

constexpr uint32_t kExternal = 0x20;  // ACL_EVENT_EXTERNAL
constexpr uint32_t kEqual = 1;        // ACL_STREAM_WAIT_VALUE_EQ

int NewEvent(const char* symbol, void** out, uint32_t flags) {
  if (out == nullptr) return Fail(kInvalidParam, "%s: no place for the event", symbol);
  auto event = std::make_shared<EventState>();
  event->is_external = (flags & kExternal) != 0;
  if (event->is_external) WorkLate();
  StreamsState& state = GetStreams();
  const Lock lock(state.mutex);
  *out = event.get();
  state.events[*out] = std::move(event);
  return kSuccess;
}

// Does the work before the last record of an event. Null, with the reason stored, if there is no such
// event, or torch_npu's task queue has failed.
std::shared_ptr<EventState> FinishEvent(const char* symbol, void* handle, bool* was_done) {
  if (QueueFailure(symbol)) return nullptr;
  StreamsState& state = GetStreams();
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
  if (stream) FinishUntil(stream, event.get(), number);
  return event;
}

}  // namespace
}  // namespace cann_host

using namespace cann_host;

extern "C" {

#define GROUP "Events"

int aclrtCreateEventWithFlag(void** event, uint32_t flags) {
  CANN_HOST_CALL(aclrtCreateEventWithFlag);
  return NewEvent("aclrtCreateEventWithFlag", event, flags);
}
int aclrtCreateEventExWithFlag(void** event, uint32_t flags) {
  CANN_HOST_CALL(aclrtCreateEventExWithFlag);
  return NewEvent("aclrtCreateEventExWithFlag", event, flags);
}

int aclrtDestroyEvent(void* event) {
  CANN_HOST_CALL(aclrtDestroyEvent);
  const Lock lock(GetStreams().mutex);
  return GetStreams().events.erase(event) ? +kSuccess : NoEvent("aclrtDestroyEvent", event);
}

int aclrtRecordEvent(void* handle, void* on) {
  CANN_HOST_CALL(aclrtRecordEvent);
  StreamsState& state = GetStreams();
  const Lock lock(state.mutex);
  const auto event = FindEvent(handle);
  const auto stream = FindStream(on);
  if (!event) return NoEvent("aclrtRecordEvent", handle);
  if (!stream) return NoStream("aclrtRecordEvent", on);
  if (event->is_external) {
    return Add("aclrtRecordEvent", on, WriteValue(&event->value, 1, event));
  }
  // In a capture it marks a place in the graph, not in time.
  event->captured = state.capturing.count(stream.get()) != 0;
  if (event->captured) return kSuccess;
  event->stream = stream;
  const uint64_t number = ++event->recorded;
  if (IsLate()) {
    stream->queue.push_back({Item::Does::kRecord, nullptr, event, number});
  } else {
    event->time = Clock::now();
    event->done = number;
  }
  return kSuccess;
}

int aclrtResetEvent(void* handle, void* on) {
  CANN_HOST_CALL(aclrtResetEvent);
  StreamsState& state = GetStreams();
  const Lock lock(state.mutex);
  const auto event = FindEvent(handle);
  if (!event) return NoEvent("aclrtResetEvent", handle);
  if (!event->is_external) {
    event->recorded = event->done = 0;
    return kSuccess;
  }
  return Add("aclrtResetEvent", on, WriteValue(&event->value, 0, event));
}

// An event that was never recorded is complete, as in CANN. A query does the work, like
// aclrtStreamQuery.
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

int aclrtSynchronizeEvent(void* handle) {
  CANN_HOST_CALL(aclrtSynchronizeEvent);
  bool done = false;
  const auto event = FinishEvent("aclrtSynchronizeEvent", handle, &done);
  if (!event) return kInvalidParam;
  const Lock lock(GetStreams().mutex);
  if (event->done >= event->recorded) return kSuccess;
  return Fail(
      kFailure,
      "aclrtSynchronizeEvent: cann_host: the event's stream waits for an external event that "
      "nothing has recorded; on a device this wait would not end");
}

int aclrtStreamWaitEvent(void* on, void* handle) {
  CANN_HOST_CALL(aclrtStreamWaitEvent);
  StreamsState& state = GetStreams();
  const Lock lock(state.mutex);
  const auto event = FindEvent(handle);
  const auto stream = FindStream(on);
  if (!event) return NoEvent("aclrtStreamWaitEvent", handle);
  if (!stream) return NoStream("aclrtStreamWaitEvent", on);
  if (event->is_external) {
    return Add("aclrtStreamWaitEvent", on, WaitForValue(&event->value, 1, kEqual, event));
  }
  if (state.graph && event->captured) {
    state.capturing.insert(stream.get());  // work that follows captured work is captured too
  } else if (IsLate() && event->done < event->recorded) {
    stream->queue.push_back({Item::Does::kWait, nullptr, event, event->recorded});
  }
  return kSuccess;
}

int aclrtEventElapsedTime(float* milliseconds, void* start, void* end) {
  CANN_HOST_CALL(aclrtEventElapsedTime);
  CANN_HOST_NEEDS(aclrtEventElapsedTime, milliseconds);
  const Lock lock(GetStreams().mutex);
  const auto first = FindEvent(start);
  const auto last = FindEvent(end);
  if (!first || !last) return NoEvent("aclrtEventElapsedTime", first ? end : start);
  if (!first->done || !last->done || first->done < first->recorded || last->done < last->recorded) {
    return Fail(kInvalidParam, "aclrtEventElapsedTime: an event was not recorded, or is not done");
  }
  *milliseconds = std::chrono::duration<float, std::milli>(last->time - first->time).count();
  return kSuccess;
}

int aclrtEventGetTimestamp(void* handle, uint64_t* timestamp) {
  CANN_HOST_CALL(aclrtEventGetTimestamp);
  CANN_HOST_NEEDS(aclrtEventGetTimestamp, timestamp);
  const Lock lock(GetStreams().mutex);
  const auto event = FindEvent(handle);
  if (!event) return NoEvent("aclrtEventGetTimestamp", handle);
  *timestamp =
      std::chrono::duration_cast<std::chrono::microseconds>(event->time.time_since_epoch()).count();
  return kSuccess;
}

}  // extern "C"
