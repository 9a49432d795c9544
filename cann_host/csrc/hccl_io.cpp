#include "hccl_io.h"

#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>

namespace cann_host {
namespace hccl {

Time After(int seconds) {
  return seconds == 0 ? Time::max() : Clock::now() + std::chrono::seconds(seconds);
}

bool Wait(std::vector<pollfd>& sockets, Time deadline) {
  for (;;) {
    int milliseconds = -1;
    if (deadline != Time::max()) {
      const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now());
      milliseconds = static_cast<int>(std::clamp<int64_t>(left.count(), 0, 3600 * 1000));
    }
    const int ready = poll(sockets.data(), sockets.size(), milliseconds);
    if (ready > 0) return true;
    if (ready == 0 && deadline != Time::max() && Clock::now() >= deadline) return false;
  }
}

namespace {

template <typename Transfer>
Io Move(int socket, short event, size_t bytes, Time deadline, Transfer transfer) {
  size_t done = 0;
  while (done < bytes) {
    const ssize_t moved = transfer(done);
    if (moved > 0) {
      done += moved;
    } else if (moved == 0 || (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)) {
      return Io::kGone;
    } else {
      std::vector<pollfd> one{{socket, event, 0}};
      if (!Wait(one, deadline)) return Io::kLate;
    }
  }
  return Io::kDone;
}

}  // namespace

Io Send(int socket, const void* data, size_t bytes, Time deadline) {
  return Move(socket, POLLOUT, bytes, deadline, [=](size_t done) {
    return send(socket, static_cast<const char*>(data) + done, bytes - done,
                MSG_NOSIGNAL | MSG_DONTWAIT);
  });
}

Io Receive(int socket, void* data, size_t bytes, Time deadline) {
  return Move(socket, POLLIN, bytes, deadline, [=](size_t done) {
    return recv(socket, static_cast<char*>(data) + done, bytes - done, MSG_DONTWAIT);
  });
}

}  // namespace hccl
}  // namespace cann_host
