// The processes of a communicator, and their messages: a star of Unix sockets with rank 0 in the
// middle. The addresses are abstract (no file, no network), every end must belong to the same user, and
// the kernel closes the sockets of a process that dies, which its peers see immediately.
#include <pthread.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <deque>
#include <exception>
#include <iterator>
#include <numeric>

#include "core.h"
#include "hccl.h"
#include "hccl_io.h"

namespace cann_host {
namespace hccl {
namespace {

constexpr char kMagic[16] = "cann_host hccl1";

// Rank 0's answer. Data follows code 0; the reason follows any other code.
struct Answer {
  int32_t code = kOk;
  uint32_t length = 0;
};

constexpr uint32_t kLongestReason = 4096;

socklen_t AddressOf(const Root& root, sockaddr_un* address) {
  *address = {};
  address->sun_family = AF_UNIX;
  // the first byte of the path stays zero: an abstract address
  std::memcpy(address->sun_path + 1, root.address, sizeof(root.address));
  return offsetof(sockaddr_un, sun_path) + 1 + strnlen(root.address, sizeof(root.address));
}

bool IsMine(int socket) {
  ucred peer{};
  socklen_t size = sizeof(peer);
  return getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 && peer.uid == geteuid();
}

std::string TokenOf(const Root& root) { return {root.token, sizeof(root.token)}; }

// Tokens of the newest roots that this process made and nobody used. Leaked: see core.cpp.
struct Given {
  static constexpr size_t kMost = 1024;
  Mutex mutex;
  std::deque<std::string> tokens;
};
Given& given = *new Given;

// Whether the error means that no more sockets can be made.
bool IsExhausted(int error) {
  return error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM;
}

std::string NoSocket(int error) {
  return std::string("[EI0006] HcclCommInitRootInfo: no socket: ") + std::strerror(error) +
         (IsExhausted(error) ? " (ulimit -n, RLIMIT_NOFILE)" : "");
}

// Other processes may hold this many connections open without blocking a rank.
constexpr size_t kMostGuests = 2 * kMostRanks;

// "rank 1" or "ranks 1, 3"
std::string Ranks(const std::vector<uint32_t>& ranks) {
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (size_t i = 0; i < ranks.size(); ++i) text += (i ? ", " : "") + std::to_string(ranks[i]);
  return text;
}

std::string Gone(const std::string& who) {
  return who + " is gone: its process has ended, or left the communicator";
}

std::string Late(const std::string& who, int seconds) {
  return who + " did not come within " + std::to_string(seconds) +
         " s (HCCL_EXEC_TIMEOUT, or hccl_exec_timeout of the communicator)";
}

}  // namespace

int NewRoot(Root* root) {
  *root = {};
  std::memcpy(root->magic, kMagic, sizeof(kMagic));
  unsigned char random[8 + sizeof(root->token)];
  if (getrandom(random, sizeof(random), 0) != sizeof(random)) {
    return Fail(kSystemCall, "HcclGetRootInfo: no random numbers: %s", std::strerror(errno));
  }
  std::memcpy(root->token, random + 8, sizeof(root->token));
  uint64_t number;
  std::memcpy(&number, random, sizeof(number));
  std::snprintf(root->address, sizeof(root->address), "cann_host.%016llx",
                static_cast<unsigned long long>(number));
  const Lock lock(given.mutex);
  given.tokens.push_back(TokenOf(*root));
  if (given.tokens.size() > Given::kMost) given.tokens.pop_front();
  return kOk;
}

// The groups of this process, for a fork. Leaked: see core.cpp.
struct Groups {
  Mutex mutex;  // of the set, and of the groups' sets of sockets
  std::set<Group*> all;

  Groups() { pthread_atfork(nullptr, nullptr, LeaveInChild); }
  static void LeaveInChild();
};
static Groups& groups = *new Groups;

void Groups::LeaveInChild() {
  for (Group* group : groups.all) {
    for (const int socket : group->open_) close(socket);
    group->open_.clear();
    group->is_forked_ = true;
  }
}

Group::Group(uint32_t ranks, uint32_t rank, std::string name, int timeout)
    : ranks_(ranks), rank_(rank), timeout_(timeout), name_(std::move(name)), peers_(ranks, -1) {
  const Lock lock(groups.mutex);
  groups.all.insert(this);
}

Group::~Group() {
  Leave();
  const Lock lock(groups.mutex);
  groups.all.erase(this);
}

template <typename Make>
int Group::Open(Make make) {
  const Lock lock(groups.mutex);  // no fork between the two
  const int socket = make();
  if (socket >= 0) open_.insert(socket);
  return socket;
}

void Group::Close(int& socket) {
  const Lock lock(groups.mutex);
  if (open_.erase(socket)) close(socket);
  socket = -1;
}

void Group::CloseUnknown() {
  const Lock lock(groups.mutex);
  for (auto at = open_.begin(); at != open_.end();) {
    const bool is_rank = std::find(peers_.begin(), peers_.end(), *at) != peers_.end();
    if (!is_rank) close(*at);
    at = is_rank ? std::next(at) : open_.erase(at);
  }
}

void Group::CloseAll() {
  std::fill(peers_.begin(), peers_.end(), -1);
  CloseUnknown();
}

std::shared_ptr<Group> Group::Connect(const Root& root, uint32_t ranks, uint32_t rank,
                                      std::string name, int connect_timeout, int exec_timeout,
                                      int* code) {
  std::shared_ptr<Group> group(new Group(ranks, rank, std::move(name), exec_timeout));
  if (std::memcmp(root.magic, kMagic, sizeof(kMagic)) != 0) {
    *code = Fail(kParameter, "HcclCommInitRootInfo: the root info is not HcclGetRootInfo's");
    return nullptr;
  }
  try {
    *code = rank == 0 ? group->Host(root, After(connect_timeout))
                      : group->Join(root, After(connect_timeout), connect_timeout);
  } catch (const std::exception& error) {  // of memory
    *code = group->End(kOutOfMemory, std::string("HcclCommInitRootInfo: ") + error.what());
  }
  return *code == kOk ? group : nullptr;
}

// Rank 0: waits for the others. Any process may connect and send nothing, so rank 0 listens to all
// connections at the same time.
int Group::Host(const Root& root, Time deadline) {
  {
    const Lock lock(given.mutex);
    const auto found = std::find(given.tokens.begin(), given.tokens.end(), TokenOf(root));
    if (found == given.tokens.end()) {
      return Fail(kParameter,
                  "HcclCommInitRootInfo: rank 0 must be the process that called "
                  "HcclGetRootInfo, and must use its root info once");
    }
    given.tokens.erase(found);
  }
  sockaddr_un address;
  const socklen_t length = AddressOf(root, &address);
  const int listener =
      Open([] { return socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0); });
  if (listener < 0 || bind(listener, reinterpret_cast<sockaddr*>(&address), length) != 0 ||
      listen(listener, kMostRanks) != 0) {
    return End(kSystemCall, NoSocket(errno));
  }
  std::vector<Guest> guests;
  for (;;) {
    std::vector<uint32_t> missing;
    for (uint32_t rank = 1; rank < ranks_; ++rank) {
      if (peers_[rank] < 0) missing.push_back(rank);
    }
    if (missing.empty()) break;
    std::vector<pollfd> sockets{{listener, POLLIN, 0}};
    Time until = deadline;
    for (const Guest& guest : guests) {
      sockets.push_back({guest.socket, POLLIN, 0});
      until = std::min(until, guest.until);
    }
    const bool is_ready = Wait(sockets, until);
    if (Clock::now() >= deadline) {
      return End(kConnect, "[EI0006] HcclCommInitRootInfo: " + Ranks(missing) +
                               " did not connect in time (HCCL_CONNECT_TIMEOUT)");
    }
    if (const int code = Hear(guests, sockets, is_ready, root)) return code;
    if (!is_ready || sockets[0].revents == 0) continue;
    int error = 0;
    int socket = Open([&] {
      const int made = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
      error = errno;
      return made;
    });
    if (socket < 0 && IsExhausted(error)) return End(kSystemCall, NoSocket(error));
    if (socket < 0) continue;
    if (!IsMine(socket)) {
      Close(socket);
      continue;
    }
    if (guests.size() == kMostGuests) {
      Close(guests.front().socket);
      guests.erase(guests.begin());
    }
    guests.push_back({socket, {}, 0, After(5)});
  }
  CloseUnknown();
  const Answer welcome;
  for (uint32_t rank = 1; rank < ranks_; ++rank) {
    if (Send(peers_[rank], &welcome, sizeof(welcome), deadline) != Io::kDone) {
      return End(kRemote, "[EI0006] HcclCommInitRootInfo: " + Gone(Ranks({rank})));
    }
  }
  return kOk;
}

// Reads the bytes that guests have sent so far, and admits the ranks. sockets[i + 1] is guest i's.
int Group::Hear(std::vector<Guest>& guests, const std::vector<pollfd>& sockets, bool is_ready,
                const Root& root) {
  std::vector<Guest> still;
  for (size_t i = 0; i < guests.size(); ++i) {
    Guest guest = guests[i];
    bool stays = Clock::now() < guest.until;
    if (is_ready && sockets[i + 1].revents != 0) {
      const ssize_t got = recv(guest.socket, reinterpret_cast<char*>(&guest.hello) + guest.bytes,
                               sizeof(guest.hello) - guest.bytes, MSG_DONTWAIT);
      stays = got > 0 || (got < 0 && (errno == EAGAIN || errno == EINTR));
      if (got > 0) guest.bytes += got;
    }
    if (!stays) {
      Close(guest.socket);
    } else if (guest.bytes < sizeof(guest.hello)) {
      still.push_back(guest);
    } else if (const int code = Welcome(guest.hello, root, guest.socket)) {
      return code;
    }
  }
  guests = std::move(still);
  return kOk;
}

// Admits a guest that has sent its hello. Not 0, with the reason stored, if there can be no communicator
// with it.
int Group::Welcome(const Hello& hello, const Root& root, int& socket) {
  if (std::memcmp(hello.token, root.token, sizeof(hello.token)) != 0) {
    Close(socket);
    return kOk;
  }
  if (hello.ranks == ranks_ && hello.rank != 0 && hello.rank < ranks_ && peers_[hello.rank] < 0) {
    peers_[hello.rank] = socket;
    return kOk;
  }
  const std::string text = "[EI0004] HcclCommInitRootInfo: a process connects as rank " +
                           std::to_string(hello.rank) + " of " + std::to_string(hello.ranks) +
                           "; there are " + std::to_string(ranks_) + ", one of each";
  const Answer answer{kParameter, static_cast<uint32_t>(text.size())};
  Send(socket, &answer, sizeof(answer), After(1));
  Send(socket, text.data(), text.size(), After(1));
  return End(kParameter, text);
}

// Rank 0 may not listen yet, or others may be before this one in its queue.
int Group::Join(const Root& root, Time deadline, int seconds) {
  sockaddr_un address;
  const socklen_t length = AddressOf(root, &address);
  int& peer = peers_[0];
  peer = Open([] { return socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0); });
  if (peer < 0) return End(kSystemCall, NoSocket(errno));
  while (connect(peer, reinterpret_cast<sockaddr*>(&address), length) != 0) {
    const int error = errno;
    const bool comes = error == EAGAIN || error == ECONNREFUSED || error == EINTR;
    if (!comes || Clock::now() >= deadline) {
      return End(kConnect,
                 std::string("[EI0006] HcclCommInitRootInfo: rank 0 cannot be reached (") +
                     std::strerror(error) +
                     ") within HCCL_CONNECT_TIMEOUT; cann_host's "
                     "ranks are processes of one user on one machine");
    }
    poll(nullptr, 0, 5);
  }
  if (!IsMine(peer)) {
    return End(kConnect, "[EI0006] HcclCommInitRootInfo: rank 0 is another user's process");
  }
  Hello hello{{}, ranks_, rank_};
  std::memcpy(hello.token, root.token, sizeof(hello.token));
  Answer answer;
  if (Send(peer, &hello, sizeof(hello), deadline) == Io::kGone) {
    return End(kConnect, "[EI0006] HcclCommInitRootInfo: " + Gone("rank 0"));
  }
  // rank 0 reports the missing ranks when its time is over; it did not begin to wait at the same time
  const Time later = deadline + std::chrono::seconds(std::clamp(seconds / 4, 1, 20));
  const Io io = Receive(peer, &answer, sizeof(answer), later);
  if (io != Io::kDone) {
    return End(kConnect, "[EI0006] HcclCommInitRootInfo: " +
                             (io == Io::kGone ? Gone("rank 0") : "rank 0 does not answer"));
  }
  if (answer.code == kOk) return kOk;
  std::string text(std::min(answer.length, kLongestReason), ' ');
  Receive(peer, text.data(), text.size(), later);
  return End(answer.code, text);
}

void Group::Leave() {
  const Lock lock(mutex_);
  CloseAll();
  if (failure_ != kOk) return;
  failure_ = kParameter;
  reason_ = "it was destroyed";
}

int Group::End(int code, const std::string& text) {
  failure_ = code;
  reason_ = text;
  const Answer answer{code, static_cast<uint32_t>(text.size())};
  for (int& peer : peers_) {
    if (rank_ == 0 && peer >= 0 && Send(peer, &answer, sizeof(answer), After(1)) == Io::kDone) {
      Send(peer, text.data(), text.size(), After(1));
    }
  }
  CloseAll();
  return Fail(code, "%s", text.c_str());
}

int Group::Run(const Call& call, const void* send, void* receive) {
  const Lock lock(mutex_);
  if (is_forked_) {
    return Fail(kParameter,
                "%s: this process was forked after the communicator %s was made, which is "
                "its parent's",
                Text(call).c_str(), name_.c_str());
  }
  if (failure_ != kOk) {
    return Fail(failure_, "%s: the communicator %s has failed before: %s", Text(call).c_str(),
                name_.c_str(), reason_.c_str());
  }
  const Time deadline = After(timeout_);
  try {
    return rank_ == 0 ? Lead(call, send, receive, deadline) : Follow(call, send, receive, deadline);
  } catch (const std::exception& error) {  // std::bad_alloc: rank 0 holds all ranks' data at a time
    return End(kOutOfMemory, "[EI0007] " + Text(call) + ": rank " + std::to_string(rank_) +
                                 " has no memory for the ranks' data: " + error.what());
  }
}

int Group::Lead(const Call& call, const void* send, void* receive, Time deadline) {
  const auto begin = [&](const char* code) { return std::string(code) + " " + Text(call) + ": "; };
  std::vector<Call> calls(ranks_);
  calls[0] = call;
  std::vector<uint32_t> missing(ranks_ - 1);
  std::iota(missing.begin(), missing.end(), 1);
  while (!missing.empty()) {
    std::vector<pollfd> sockets;
    for (const uint32_t rank : missing) sockets.push_back({peers_[rank], POLLIN, 0});
    if (!Wait(sockets, deadline)) {
      return End(kTimeout, begin("[EI0002]") + Late(Ranks(missing), timeout_));
    }
    std::vector<uint32_t> left;
    for (size_t i = 0; i < missing.size(); ++i) {
      const uint32_t rank = missing[i];
      if (sockets[i].revents == 0) {
        left.push_back(rank);
      } else if (Receive(peers_[rank], &calls[rank], sizeof(Call), deadline) != Io::kDone) {
        return End(kRemote, begin("[EI0002]") + Gone(Ranks({rank})));
      }
    }
    missing = left;
  }
  if (const std::string text = Difference(calls); !text.empty()) {
    return End(kParameter, "[EI0005] the ranks' calls differ: " + text);
  }

  // The ranks' data one after the other, or reduced: in the order of the ranks, not of arrival.
  const size_t width = Width(call.dtype);
  std::vector<char> all, more;
  for (uint32_t rank = 0; rank < ranks_; ++rank) {
    const size_t bytes = Gives(calls[rank], rank, ranks_) * width;
    const bool adds = IsReduction(call) && rank != 0;
    if (adds) more.resize(bytes);
    if (!adds) all.resize(all.size() + bytes);
    char* place = adds ? more.data() : all.data() + all.size() - bytes;
    if (rank == 0) {
      if (bytes) std::memcpy(place, send, bytes);
    } else if (Receive(peers_[rank], place, bytes, deadline) != Io::kDone) {
      return End(kRemote, begin("[EI0002]") + Gone(Ranks({rank})));
    }
    if (adds) Reduce(call.dtype, call.op, bytes / width, all.data(), more.data());
  }

  const Answer done;
  for (uint32_t rank = 0; rank < ranks_; ++rank) {
    char* place = static_cast<char*>(receive);
    bool is_sent = rank == 0 || Send(peers_[rank], &done, sizeof(done), deadline) == Io::kDone;
    for (const auto& [first, count] : Pieces(calls, rank)) {
      const char* piece = all.data() + first * width;
      const size_t bytes = count * width;
      if (bytes == 0) continue;
      if (rank == 0) {
        std::memcpy(place, piece, bytes);
        place += bytes;
      } else {
        is_sent = is_sent && Send(peers_[rank], piece, bytes, deadline) == Io::kDone;
      }
    }
    if (!is_sent) return End(kRemote, begin("[EI0002]") + Gone(Ranks({rank})));
  }
  return kOk;
}

int Group::Follow(const Call& call, const void* send, void* receive, Time deadline) {
  const int peer = peers_[0];
  const size_t width = Width(call.dtype);
  Io io = Send(peer, &call, sizeof(call), deadline);
  if (io == Io::kDone) io = Send(peer, send, Gives(call, rank_, ranks_) * width, deadline);
  // If rank 0 has ended the communicator, its reason can be read.
  Answer answer;
  if (io != Io::kLate) io = Receive(peer, &answer, sizeof(answer), deadline);
  if (io == Io::kDone && answer.code != kOk) {
    std::string text(std::min(answer.length, kLongestReason), ' ');
    if (Receive(peer, text.data(), text.size(), deadline) == Io::kDone) {
      return End(answer.code, text);
    }
  }
  if (io == Io::kDone) {
    io = Receive(peer, receive, Gets(call, rank_, ranks_) * width, deadline);
  }
  if (io == Io::kDone) return kOk;
  const std::string text = "[EI0002] " + Text(call) + ": ";
  return io == Io::kLate ? End(kTimeout, text + Late("rank 0", timeout_))
                         : End(kRemote, text + Gone("rank 0"));
}

}  // namespace hccl
}  // namespace cann_host
