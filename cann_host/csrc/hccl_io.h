// Bytes through a socket, until a deadline.
#pragma once

#include <poll.h>

#include <chrono>
#include <cstddef>
#include <vector>

namespace cann_host {
namespace hccl {

using Clock = std::chrono::steady_clock;
using Time = Clock::time_point;

// So many seconds from now; 0 is never.
Time After(int seconds);

// Waits until something can be done with one of these; false when it is too late.
bool Wait(std::vector<pollfd>& sockets, Time deadline);

enum class Io { kDone, kGone, kLate };

Io Send(int socket, const void* data, size_t bytes, Time deadline);
Io Receive(int socket, void* data, size_t bytes, Time deadline);

}  // namespace hccl
}  // namespace cann_host
