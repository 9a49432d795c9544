// What the files of libhccl share. hccl.cpp: CANN's functions and their checks; hccl_call.cpp: the call
// of a collective; hccl_group.cpp: the processes of a communicator and their messages; hccl_reduce.cpp:
// the arithmetic.
#pragma once

#include <poll.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "mutex.h"

namespace cann_host {
namespace hccl {

// HcclResult of the public header, those that are returned here.
enum Result : int {
  kOk = 0,
  kParameter = 1,
  kNullPointer = 2,
  kNotSupported = 5,
  kSystemCall = 8,
  kTimeout = 9,
  kConnect = 11,
  kRemote = 21,
  kOutOfMemory = 24,
};

enum ReduceOp : int32_t { kSum = 0, kProd = 1, kMax = 2, kMin = 3 };  // HcclReduceOp

// HcclDataType
enum Dtype : int32_t {
  kInt8 = 0,
  kInt16 = 1,
  kInt32 = 2,
  kFloat16 = 3,
  kFloat32 = 4,
  kInt64 = 5,
  kUint64 = 6,
  kUint8 = 7,
  kUint16 = 8,
  kUint32 = 9,
  kFloat64 = 10,
  kBfloat16 = 11,
  kFloat8E4M3 = 15,
  kFloat8E5M2 = 16,
};

// Bytes of an element, 0 for a dtype that is not known here; and its name.
size_t Width(int32_t dtype);
const char* Name(int32_t dtype);
const char* OpName(int32_t op);

// Whether the chip reduces this dtype by this op. Source: HcclAllReduce, HcclReduceScatter and
// HcclReduce in the HCCL documents, which agree.
bool CanReduce(const std::string& soc, int32_t dtype, int32_t op);

// total = total op more, `count` elements of one of the dtypes above. Each step is rounded to the
// dtype; integers wrap; NaN stays NaN.
void Reduce(int32_t dtype, int32_t op, uint64_t count, void* total, const void* more);

constexpr uint32_t kMostRanks = 64;  // as many as there can be devices

enum class Kind : int32_t {
  kAllReduce,
  kReduce,
  kReduceScatter,
  kAllGather,
  kBroadcast,
  kScatter,
  kAllToAll,
  kSend,  // from the root to the other of two ranks
  kBarrier,
};

// The call of one rank. All fields except the arrays must be the same on all ranks.
struct Call {
  Kind kind;
  int32_t dtype = kInt8;
  int32_t op = kSum;
  uint32_t root = 0;
  uint64_t count = 0;  // elements of the smallest piece: of one rank's part, or of the whole
  // AllToAll: elements for each rank and from each rank
  std::array<uint64_t, kMostRanks> sends{}, receives{};
};
std::string Text(const Call& call);

// Whether the ranks' data is reduced.
bool IsReduction(const Call& call);
// Elements that a rank sends to a collective, and receives from it.
uint64_t Gives(const Call& call, uint32_t rank, uint32_t ranks);
uint64_t Gets(const Call& call, uint32_t rank, uint32_t ranks);
// The place of a rank's part in the data of all ranks: (first element, elements) of each piece.
std::vector<std::pair<uint64_t, uint64_t>> Pieces(const std::vector<Call>& calls, uint32_t rank);
// How the ranks' calls differ; empty if they fit together.
std::string Difference(const std::vector<Call>& calls);

// The most elements of a call, so that the bytes of all ranks' parts do not overflow.
constexpr uint64_t kMostElements = UINT64_MAX / 8 / kMostRanks;

// The address of a communicator: rank 0 listens there, and all other ranks connect to it. 0 is a
// success. It uses no resources of the system before it is used.
struct Root {
  char magic[16];
  char address[32];  // of a socket in Linux's abstract namespace: no file, no network
  char token[16];    // a secret that only processes with the root info have
};
int NewRoot(Root* root);

// The first message of a rank.
struct Hello {
  char token[16];
  uint32_t ranks, rank;
};

// A process that connected and has not yet sent its hello.
struct Guest {
  int socket;
  Hello hello;
  size_t bytes;  // of the hello, so far
  std::chrono::steady_clock::time_point until;
};

// One rank's side of a communicator. The ranks are processes of one user on one machine; rank 0
// collects the data of all ranks, computes, and sends each rank its part. If a rank is gone, is late,
// or makes another call, all ranks get an error and the communicator ends. A child that a rank forks is
// not a member: it keeps no socket, because the other ranks would treat it as a rank that lives.
class Group {
 public:
  // Waits until all ranks are there; times are in seconds. On failure null, with the reason stored and
  // the code in `code`.
  static std::shared_ptr<Group> Connect(const Root& root, uint32_t ranks, uint32_t rank,
                                        std::string name, int connect_timeout, int exec_timeout,
                                        int* code);
  ~Group();
  Group(const Group&) = delete;

  // Takes part in a collective. The buffers are already checked; AllToAll's have no gaps.
  int Run(const Call& call, const void* send, void* receive);
  // Closes the sockets, so that the other ranks see that this rank is gone.
  void Leave();

  const std::string& name() const { return name_; }
  uint32_t ranks() const { return ranks_; }
  uint32_t rank() const { return rank_; }

 private:
  using Time = std::chrono::steady_clock::time_point;

  Group(uint32_t ranks, uint32_t rank, std::string name, int timeout);
  int Host(const Root& root, Time deadline);
  int Join(const Root& root, Time deadline, int seconds);
  int Hear(std::vector<Guest>& guests, const std::vector<pollfd>& sockets, bool is_ready,
           const Root& root);
  int Welcome(const Hello& hello, const Root& root, int& socket);
  int Lead(const Call& call, const void* send, void* receive, Time deadline);
  int Follow(const Call& call, const void* send, void* receive, Time deadline);
  // Ends the communicator: sends the reason to the ranks that rank 0 still reaches, and stores it.
  int End(int code, const std::string& text);

  // Every socket of the group is opened and closed through these; -1 is none.
  template <typename Make>
  int Open(Make make);
  void Close(int& socket);
  void CloseUnknown();  // all sockets except those of ranks
  void CloseAll();
  friend struct Groups;

  const uint32_t ranks_, rank_;
  const int timeout_;  // seconds to wait for the others in a collective; 0 waits for ever
  const std::string name_;
  Mutex mutex_{Holding::kLong};  // one collective at a time
  std::vector<int> peers_;       // sockets by rank: rank 0's to all, the others' to rank 0
  std::set<int> open_;           // all sockets
  bool is_forked_ = false;       // this is the copy in a child
  int failure_ = kOk;
  std::string reason_;
};

}  // namespace hccl
}  // namespace cann_host
