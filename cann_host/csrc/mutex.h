// Locks that are in a valid state after a fork. A child has only the thread that forked: a lock that
// another thread held would never be released, and the data that it guards would be half changed.
#pragma once

#include <mutex>

namespace cann_host {

enum class Holding {
  kMoments,  // a fork waits until it is free, so what it guards is whole in the child
  kLong,     // while Python computes or other processes are waited for: free again in the child
};

// Otherwise like std::mutex. For a lock that lives as long as the process, or that is destroyed with
// its owner.
class Mutex {
 public:
  explicit Mutex(Holding holding = Holding::kMoments);
  ~Mutex();
  Mutex(const Mutex&) = delete;

  void lock() { mutex_.lock(); }
  bool try_lock() { return mutex_.try_lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  friend struct Mutexes;
  std::mutex mutex_;
  const Holding holding_;
};

using Lock = std::lock_guard<Mutex>;

}  // namespace cann_host
