// Memory whose bytes Python keeps a conversion of (cann_host/weights.py): whether it was written, or
// freed, since. All that writes device memory tells it to NoteWrite.
#include <algorithm>
#include <atomic>
#include <map>
#include <unordered_map>

#include "bindings.h"
#include "core.h"

namespace cann_host {
namespace {

using Places = std::multimap<uintptr_t, std::pair<uintptr_t, uint64_t>>;  // begin: end, number

// Leaked: see core.cpp.
struct Tracked {
  Mutex mutex;
  Places places;
  std::unordered_map<uint64_t, Places::iterator> by_number;
  uintptr_t longest = 0;  // bytes of the largest
  uint64_t next = 1;
};
Tracked& GetTracked() {
  static Tracked* tracked = new Tracked;
  return *tracked;
}
[[maybe_unused]] Tracked& made = GetTracked();

std::atomic<bool> tracks_any{false};

}  // namespace

bool IsTracking() { return tracks_any; }

void NoteWrite(const void* data, size_t bytes) {
  if (!tracks_any || bytes == 0) return;
  Tracked& tracked = GetTracked();
  const auto begin = reinterpret_cast<uintptr_t>(data), end = begin + bytes;
  const Lock lock(tracked.mutex);
  auto at = tracked.places.lower_bound(begin - std::min(begin, tracked.longest));
  while (at != tracked.places.end() && at->first < end) {
    const auto [their_end, number] = at->second;
    if (their_end > begin) {
      tracked.by_number.erase(number);
      at = tracked.places.erase(at);
    } else {
      ++at;
    }
  }
  tracks_any = !tracked.places.empty();
}

}  // namespace cann_host

using namespace cann_host;

extern "C" {

// Tracks bytes until they are written or freed. Returns a number, unique; 0 if they do not lie in memory
// that was allocated here.
uint64_t cann_host_track(const void* address, uint64_t bytes) {
  if (bytes == 0 || !IsAllocated(address, bytes)) return 0;
  Tracked& tracked = GetTracked();
  const auto begin = reinterpret_cast<uintptr_t>(address);
  const Lock lock(tracked.mutex);
  const uint64_t number = tracked.next++;
  const Places::value_type place{begin, {begin + bytes, number}};
  tracked.by_number[number] = tracked.places.insert(place);
  tracked.longest = std::max<uintptr_t>(tracked.longest, bytes);
  tracks_any = true;
  return number;
}

// Whether the bytes of a number were neither written nor freed since.
int cann_host_is_tracked(uint64_t number) {
  Tracked& tracked = GetTracked();
  const Lock lock(tracked.mutex);
  return tracked.by_number.count(number) != 0 ? 1 : 0;
}

void cann_host_untrack(uint64_t number) {
  Tracked& tracked = GetTracked();
  const Lock lock(tracked.mutex);
  const auto found = tracked.by_number.find(number);
  if (found == tracked.by_number.end()) return;
  tracked.places.erase(found->second);
  tracked.by_number.erase(found);
  tracks_any = !tracked.places.empty();
}

// Python has written memory.
void cann_host_wrote(const void* address, uint64_t bytes) { NoteWrite(address, bytes); }

}  // extern "C"
