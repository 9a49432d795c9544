// What the files of libascendcl's streams share: stream.cpp (streams and their work), event.cpp (events)
// and capture.cpp (captured graphs).
#pragma once

#include <atomic>
#include <chrono>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "core.h"

namespace cann_host {

using Clock = std::chrono::steady_clock;

struct StreamState;

struct EventState {
  Clock::time_point time;
  uint64_t recorded = 0;              // how often the event was recorded
  uint64_t done = 0;                  // the last of these records that was done
  bool captured = false;              // the last record is part of the graph that is being captured
  std::weak_ptr<StreamState> stream;  // where it was recorded
  // An external event is a value that work can wait for before it is written: 1 after a record.
  bool is_external = false;
  uint64_t value = 0;
};

// One piece of work: a task, or the record of an event, the wait for one, or the wait for a value.
struct Item {
  enum class Does { kTask, kRecord, kWait, kWaitValue };
  Does does = Does::kTask;
  Task task{};
  std::shared_ptr<EventState> event{};
  uint64_t number = 0;            // the record, of the event's
  Reach value{nullptr, 0, 0};     // what is waited for; a task that has one writes it
  std::function<bool()> holds{};  // whether the wait for a value is over
};

// The wait for a value, and the task that writes one. The event, if any, owns the address.
Item WaitForValue(const uint64_t* address, uint64_t value, uint32_t condition,
                  std::shared_ptr<EventState> event);
Item WriteValue(uint64_t* address, uint64_t value, std::shared_ptr<EventState> event);
// Puts an item into the graph that the stream captures, or into its queue. The caller holds the lock.
int Add(const char* symbol, void* stream, Item item);

constexpr int kLostInFork = -1;  // not a code of CANN

struct StreamState {
  int32_t id = 0;
  int device = 0;
  uint32_t overflow_switch = 0;
  std::map<int, uint32_t> cores;  // limits that were set, by kind
  std::deque<Item> queue;
  // The first failure since the last wait. Later tasks are dropped, as on a device.
  std::atomic<int> failure{0};
};

// Tasks of a captured graph that the program can replace.
struct TaskGroup {
  std::vector<Task> tasks;
};

struct Captured {
  std::deque<Item> items;
  std::vector<std::shared_ptr<TaskGroup>> groups;
};

// The new tasks for a group, while they are launched.
struct Update {
  std::shared_ptr<TaskGroup> group;
  std::vector<Task> tasks;
};

// Leaked: see core.cpp.
struct StreamsState {
  std::recursive_mutex work;  // held by the thread that does late work
  Mutex mutex;                // of everything below, for moments only
  std::map<void*, std::shared_ptr<StreamState>> streams;
  std::map<int, std::shared_ptr<StreamState>> defaults;  // by device: the stream that null means
  std::map<void*, std::shared_ptr<EventState>> events;
  int32_t next_id = 0;
  std::shared_ptr<EventState> last_turn;  // of OnStreamInTurn
  std::vector<StreamState*> doing;        // a late task of theirs is being done
  std::unique_ptr<Captured> graph;        // one capture at a time
  std::set<StreamState*> capturing;
  std::map<StreamState*, std::shared_ptr<TaskGroup>> grouping;  // a group was begun, and is open
  std::map<StreamState*, Update> updating;
  std::map<void*, std::shared_ptr<const Captured>> graphs;  // finished ones
  std::map<void*, std::weak_ptr<TaskGroup>> groups;         // of all graphs
};

StreamsState& GetStreams();

// Whether a graph is being captured or updated, on whatever stream.
extern std::atomic<bool> is_capturing;

// From now on all work waits for the program: a stream may wait for a value that the program lets
// another stream write later, such as a captured graph that is updated after its replay began.
void WorkLate();

// Null if there is no such stream or event. The caller holds the lock.
std::shared_ptr<StreamState> FindStream(void* handle);
std::shared_ptr<EventState> FindEvent(void* handle);

// Fails with a text: there is no such stream or event.
int NoStream(const char* symbol, void* handle);
int NoEvent(const char* symbol, void* handle);

// Does the work that the stream has now, up to a record of an event if one is given. It does not do work
// that other threads add meanwhile. Takes the work's lock.
void FinishUntil(const std::shared_ptr<StreamState>& stream, const EventState* until,
                 uint64_t number);

}  // namespace cann_host
