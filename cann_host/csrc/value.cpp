// libascendcl: values in memory that work waits for and writes.
#include "stream.h"

namespace cann_host {

namespace {

constexpr uint32_t kLastCondition = 3;  // ACL_STREAM_WAIT_VALUE_NOR

bool IsValue(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % sizeof(uint64_t) == 0 &&
         IsAllocated(address, sizeof(uint64_t));
}

}  // namespace

Item WaitForValue(const uint64_t* address, uint64_t value, uint32_t condition,
                  std::shared_ptr<EventState> event) {
  // hicann/runtime, docs: aclrtValueWait
  const auto holds = [=] {
    const uint64_t found = *address;
    switch (condition) {
      case 0:
        return static_cast<int64_t>(found - value) >= 0;
      case 1:
        return found == value;
      case 2:
        return (found & value) != 0;
      default:
        return ~(found | value) != 0;
    }
  };
  WorkLate();
  Item item{Item::Does::kWaitValue, nullptr, std::move(event)};
  item.value = ReachOf(address, sizeof value);
  item.holds = holds;
  return item;
}

Item WriteValue(uint64_t* address, uint64_t value, std::shared_ptr<EventState> event) {
  Item item;
  item.value = ReachOf(address, sizeof value);
  item.task = [=, reach = item.value] {
    if (!IsThere(reach)) {
      return Fail(kInvalidParam, "aclrtValueWrite: %p is no longer allocated", reach.data);
    }
    *address = value;
    return +kSuccess;
  };
  item.event = std::move(event);
  return item;
}

int Add(const char* symbol, void* handle, Item item) {
  StreamsState& state = GetStreams();
  const auto stream = FindStream(handle);
  if (!stream) return NoStream(symbol, handle);
  if (state.updating.count(stream.get()) || state.grouping.count(stream.get())) {
    return Fail(kInvalidParam, "%s: not in a group of tasks (cann_host)", symbol);
  }
  const bool is_captured = state.graph && state.capturing.count(stream.get());
  auto& items = is_captured ? state.graph->items : stream->queue;
  items.push_back(std::move(item));
  return kSuccess;
}

}  // namespace cann_host

using namespace cann_host;

#define GROUP "Events"

extern "C" {

// torch_npu's external events are such values.
int aclrtValueWait(void* address, uint64_t value, uint32_t condition, void* stream) {
  CANN_HOST_CALL(aclrtValueWait);
  if (condition > kLastCondition || !IsValue(address)) {
    return Fail(kInvalidParam, "aclrtValueWait: 8 bytes at %p, condition %u", address, condition);
  }
  const Lock lock(GetStreams().mutex);
  return Add("aclrtValueWait", stream,
             WaitForValue(static_cast<uint64_t*>(address), value, condition, nullptr));
}

int aclrtValueWrite(void* address, uint64_t value, uint32_t, void* stream) {
  CANN_HOST_CALL(aclrtValueWrite);
  if (!IsValue(address)) {
    return Fail(kInvalidParam, "aclrtValueWrite: %p is not 8 bytes of device memory", address);
  }
  Item item = WriteValue(static_cast<uint64_t*>(address), value, nullptr);
  if (!IsDeferring()) return item.task();
  const Lock lock(GetStreams().mutex);
  return Add("aclrtValueWrite", stream, std::move(item));
}

}  // extern "C"
