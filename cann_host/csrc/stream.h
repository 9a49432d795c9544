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
};

// One piece of work: a task, or the record of an event, or the wait for one.
struct Item {
  Task task;
  std::shared_ptr<EventState> event;
  uint64_t number = 0;  // the record, of the event's
  bool waits = false;
};

constexpr int kLostInFork = -1;  // not a code of CANN

struct StreamState {
  int32_t id = 0;
  int device = 0;
  uint32_t overflow_switch = 0;
  std::deque<Item> queue;
  // The first failure since the last wait. Later tasks are dropped, as on a device.
  std::atomic<int> failure{0};
};

struct Captured {
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
  std::map<void*, std::shared_ptr<const Captured>> graphs;  // finished ones
};

StreamsState& GetStreams();

// Whether a graph is being captured, on whatever stream.
extern std::atomic<bool> is_capturing;

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
