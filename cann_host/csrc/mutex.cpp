#include "mutex.h"

#include <pthread.h>
#include <sched.h>

#include <new>
#include <set>

namespace cann_host {

struct Mutexes {
  std::mutex mutex;
  std::set<Mutex*> all;

  // Takes every lock that is held for moments only. It never waits for a lock while it holds others, so
  // the order in which threads nest them does not matter.
  void LockAll() {
    for (;;) {
      mutex.lock();
      auto next = all.begin();
      while (next != all.end() && Take(**next)) ++next;
      if (next == all.end()) return;
      while (next != all.begin()) Give(**--next);
      mutex.unlock();
      sched_yield();
    }
  }
  void UnlockAll() {
    for (Mutex* one : all) Give(*one);
    mutex.unlock();
  }
  void RenewAll() {
    for (Mutex* one : all) new (&one->mutex_) std::mutex;
    new (&mutex) std::mutex;
  }

 private:
  static bool Take(Mutex& one) { return one.holding_ == Holding::kLong || one.try_lock(); }
  static void Give(Mutex& one) {
    if (one.holding_ == Holding::kMoments) one.unlock();
  }
};

namespace {

// Leaked: see core.cpp.
Mutexes& GetMutexes() {
  static auto* mutexes = [] {
    pthread_atfork([] { GetMutexes().LockAll(); }, [] { GetMutexes().UnlockAll(); },
                   [] { GetMutexes().RenewAll(); });
    return new Mutexes;
  }();
  return *mutexes;
}

}  // namespace

Mutex::Mutex(Holding holding) : holding_(holding) {
  std::lock_guard<std::mutex> lock(GetMutexes().mutex);
  GetMutexes().all.insert(this);
}

Mutex::~Mutex() {
  std::lock_guard<std::mutex> lock(GetMutexes().mutex);
  GetMutexes().all.erase(this);
}

}  // namespace cann_host
