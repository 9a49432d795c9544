// libhccl: collectives between the devices of one machine, one process for each device. This file has
// CANN's functions and their checks; hccl_group.cpp does the collectives. A collective is work on its
// stream like any other.
#include "hccl.h"

#include <cstdlib>
#include <cstring>
#include <map>

#include "bindings.h"
#include "core.h"

namespace {

using cann_host::Fail;
using namespace cann_host::hccl;

// HcclCommConfig of the public header up to what is read here; a caller's may be longer.
struct Config {
  size_t size;
  uint32_t magic, version;
  uint64_t reserved;
  uint32_t buffer_size, deterministic;
  char name[128];
  char udi[128];
  uint32_t expansion_mode, traffic_class, service_level, world_rank;
  uint64_t job;
  uint8_t zero_copy;
  int32_t exec_timeout;
};
constexpr uint32_t kConfigMagic = 0xf0f0f0f0;
constexpr int32_t kNotSet = -1;
// Seconds: CANN's defaults. CANN takes no connect timeout below 120; tests need a shorter one.
constexpr int kExecTimeout = 1836, kConnectTimeout = 120;

// A number of seconds from a variable.
int ReadSeconds(const char* variable, int least, int* seconds) {
  const char* text = std::getenv(variable);
  if (text == nullptr || *text == '\0') return kOk;
  char* end = nullptr;
  const long value = std::strtol(text, &end, 10);
  if (*end != '\0' || value < least || value > INT32_MAX) {
    return Fail(kParameter, "[EI0001] %s is '%s'; it must be a whole number of seconds, %d or more",
                variable, text, least);
  }
  *seconds = static_cast<int>(value);
  return kOk;
}

// Leaked: see core.cpp.
struct State {
  cann_host::Mutex mutex;
  std::map<void*, std::shared_ptr<Group>> groups;
};
State& GetState() {
  static State* state = new State;
  return *state;
}
[[maybe_unused]] State& made = GetState();

std::shared_ptr<Group> Find(void* handle) {
  State& state = GetState();
  const cann_host::Lock lock(state.mutex);
  const auto found = state.groups.find(handle);
  return found == state.groups.end() ? nullptr : found->second;
}

std::shared_ptr<Group> Find(const std::string& name) {
  State& state = GetState();
  const cann_host::Lock lock(state.mutex);
  for (const auto& [handle, group] : state.groups) {
    if (group->name() == name) return group;
  }
  return nullptr;
}

int NoGroup(const char* symbol, void* handle) {
  if (handle == nullptr) return Fail(kNullPointer, "%s: the communicator is null", symbol);
  return Fail(kParameter, "%s: %p is not a communicator", symbol, handle);
}

int NoPlace(const char* symbol) {
  return Fail(kNullPointer, "%s: no place for the answer", symbol);
}

// `timeout`: of collectives; with kNotSet, the value of the variable.
int Connect(const char* symbol, uint32_t ranks, const Root* root, uint32_t rank, std::string name,
            int timeout, void** out) {
  if (root == nullptr || out == nullptr) {
    return Fail(kNullPointer, "%s: no root info, or no place for the communicator", symbol);
  }
  if (ranks == 0 || ranks > kMostRanks || rank >= ranks) {
    return Fail(kParameter, "%s: rank %u of %u; cann_host has up to %u", symbol, rank, ranks,
                kMostRanks);
  }
  if (name.empty())
    name = std::string(root->address, strnlen(root->address, sizeof(root->address)));
  int exec_timeout = kExecTimeout, connect_timeout = kConnectTimeout;
  int code = ReadSeconds("HCCL_EXEC_TIMEOUT", 0, &exec_timeout);
  if (code == kOk) code = ReadSeconds("HCCL_CONNECT_TIMEOUT", 1, &connect_timeout);
  if (code != kOk) return code;
  if (timeout != kNotSet) exec_timeout = timeout;
  auto group = Group::Connect(*root, ranks, rank, name, connect_timeout, exec_timeout, &code);
  if (group == nullptr) return code;
  *out = group.get();
  State& state = GetState();
  const cann_host::Lock lock(state.mutex);
  state.groups[*out] = std::move(group);
  return kOk;
}

// One buffer of a collective: its address and its number of elements.
struct Buffer {
  const char* name;
  const void* data;
  uint64_t count;
};

int Check(const char* symbol, const Buffer& buffer, int32_t dtype) {
  const size_t width = Width(dtype);
  uint64_t bytes = 0;
  if (__builtin_mul_overflow(buffer.count, width, &bytes)) bytes = UINT64_MAX;
  if (bytes == 0) return kOk;
  if (buffer.data == nullptr) return Fail(kNullPointer, "%s: %s is null", symbol, buffer.name);
  if (reinterpret_cast<uintptr_t>(buffer.data) % width != 0) {
    return Fail(kParameter, "%s: %s is at %p, not a multiple of the %zu bytes of %s", symbol,
                buffer.name, buffer.data, width, Name(dtype));
  }
  if (cann_host::IsAllocated(buffer.data, bytes)) return kOk;
  return Fail(kParameter,
              "%s: %s: %llu elements %s at %p are not all in memory that was allocated "
              "here",
              symbol, buffer.name, static_cast<unsigned long long>(buffer.count), Name(dtype),
              buffer.data);
}

cann_host::Reach ReachOf(const Buffer& buffer, int32_t dtype) {
  return cann_host::ReachOf(buffer.data, buffer.count * Width(dtype));
}

// Whether the chip has this collective, eager or in a graph.
int Check(const char* symbol, const Group& group, const Call& call) {
  const std::string& soc = cann_host::GetOptions().soc;
  const bool is_fp8 = call.dtype == kFloat8E4M3 || call.dtype == kFloat8E5M2;
  if (Width(call.dtype) == 0 || (is_fp8 && soc.rfind("Ascend950", 0) != 0)) {
    return Fail(kNotSupported, "%s: dtype %d (%s) is not one of %s's", symbol, call.dtype,
                Name(call.dtype), soc.c_str());
  }
  if (IsReduction(call) && !CanReduce(soc, call.dtype, call.op)) {
    return Fail(kNotSupported, "%s: %s does not reduce %s by %s", symbol, soc.c_str(),
                Name(call.dtype), OpName(call.op));
  }
  if (call.root >= group.ranks()) {
    return Fail(kParameter, "%s: root %u of %u ranks", symbol, call.root, group.ranks());
  }
  if (call.count > kMostElements) {
    return Fail(kParameter, "%s: a count of %llu", symbol,
                static_cast<unsigned long long>(call.count));
  }
  return kOk;
}

int Launched(const char* symbol, void* handle, const Call& call, const Buffer& send,
             const Buffer& receive, void* stream) {
  const auto group = Find(handle);
  if (!group) return NoGroup(symbol, handle);
  int code = Check(symbol, *group, call);
  if (code == kOk) code = Check(symbol, send, call.dtype);
  if (code == kOk) code = Check(symbol, receive, call.dtype);
  if (code != kOk) return code;
  const auto from = ReachOf(send, call.dtype), to = ReachOf(receive, call.dtype);
  return cann_host::OnStreamInTurn(symbol, stream, [symbol, group, call, from, to] {
    // this may run much later, and several times in a captured graph
    for (const auto& reach : {from, to}) {
      if (!cann_host::IsThere(reach)) {
        return Fail(kParameter, "%s: %zu bytes at %p are no longer allocated", symbol, reach.bytes,
                    reach.data);
      }
    }
    const int code = group->Run(call, from.data, const_cast<void*>(to.data));
    cann_host::NoteWrite(to.data, to.bytes);
    return code;
  });
}

int Launch(const char* symbol, void* handle, const Call& call, const Buffer& send,
           const Buffer& receive, void* stream) {
  return cann_host::ReportLaunch(Launched(symbol, handle, call, send, receive, stream));
}

uint32_t RanksOf(void* handle) {
  const auto group = Find(handle);
  return group ? group->ranks() : 0;
}

uint32_t RankOf(void* handle) {
  const auto group = Find(handle);
  return group ? group->rank() : 0;
}

// One side of an HcclAlltoAllV: elements for, or from, each rank, and where they begin.
struct Side {
  const void* data;
  const uint64_t* counts;
  const uint64_t* offsets;  // null for one after the other
  int dtype;
};

int AllToAllV(const char* symbol, const Side& send, const Side& receive, void* comm, void* stream) {
  if (!Find(comm)) return NoGroup(symbol, comm);
  Call call{Kind::kAllToAll, send.dtype, kSum, 0, 0, {}, {}};
  if (send.dtype != receive.dtype) {
    return Fail(kNotSupported, "%s: cann_host sends and receives one dtype, not %s and %s", symbol,
                Name(send.dtype), Name(receive.dtype));
  }
  uint64_t totals[2] = {0, 0};
  for (int side = 0; side < 2; ++side) {
    const Side& from = side == 0 ? send : receive;
    if (from.counts == nullptr) return Fail(kNullPointer, "%s: the counts are null", symbol);
    for (uint32_t rank = 0; rank < RanksOf(comm); ++rank) {
      const uint64_t count = from.counts[rank];
      if (count > kMostElements) {
        return Fail(kParameter, "%s: a count of %llu", symbol,
                    static_cast<unsigned long long>(count));
      }
      if (from.offsets != nullptr && count != 0 && from.offsets[rank] != totals[side]) {
        return Fail(kNotSupported,
                    "%s: cann_host takes the ranks' parts one after the other, "
                    "without gaps",
                    symbol);
      }
      (side == 0 ? call.sends : call.receives)[rank] = count;
      totals[side] += count;
    }
  }
  return Launch(symbol, comm, call, {"sendBuf", send.data, totals[0]},
                {"recvBuf", receive.data, totals[1]}, stream);
}

int Pair(const char* symbol, uint32_t from, uint32_t other, const Buffer& buffer, int dtype,
         void* comm, void* stream) {
  if (!Find(comm)) return NoGroup(symbol, comm);
  if (RanksOf(comm) > 2) {
    return Fail(kNotSupported, "%s: cann_host sends within communicators of two ranks only",
                symbol);
  }
  if (other == RankOf(comm)) return Fail(kParameter, "%s: rank %u is this one", symbol, other);
  return Launch(symbol, comm, {Kind::kSend, dtype, kSum, from, buffer.count, {}, {}}, buffer,
                buffer, stream);
}

}  // namespace

#define GROUP "Collectives (hccl)"

extern "C" {

struct HcclConfigValue {
  int value;
};

int HcclSetConfig(int config, HcclConfigValue) {
  CANN_HOST_CALL(HcclSetConfig);
  // 0 asks for deterministic collectives, which these are anyway.
  if (config == 0) return kOk;
  return Fail(kNotSupported, "cann_host: HcclSetConfig: item %d is not implemented", config);
}

int HcclGetRootInfo(Root* root) {
  CANN_HOST_CALL(HcclGetRootInfo);
  if (root == nullptr) return Fail(kNullPointer, "HcclGetRootInfo: no place for it");
  return NewRoot(root);  // the caller's has 4108 bytes
}

int HcclCommInitRootInfo(uint32_t ranks, const Root* root, uint32_t rank, void** comm) {
  CANN_HOST_CALL(HcclCommInitRootInfo);
  return Connect("HcclCommInitRootInfo", ranks, root, rank, "", kNotSet, comm);
}

int HcclCommInitRootInfoConfig(uint32_t ranks, const Root* root, uint32_t rank,
                               const Config* config, void** comm) {
  CANN_HOST_CALL(HcclCommInitRootInfoConfig);
  const char* symbol = "HcclCommInitRootInfoConfig";
  if (config == nullptr) return Fail(kNullPointer, "%s: no config", symbol);
  if (config->magic != kConfigMagic || config->size < sizeof(Config)) {
    return Fail(kParameter,
                "%s: the config was not made by HcclCommConfigInit of CANN 8.3 or newer", symbol);
  }
  const std::string name(config->name, strnlen(config->name, sizeof(config->name)));
  if (config->exec_timeout < kNotSet) {
    return Fail(kParameter, "%s: an exec timeout of %d s", symbol, config->exec_timeout);
  }
  return Connect(symbol, ranks, root, rank, name, config->exec_timeout, comm);
}

// Fields of a config up to this number are known; only the name and the timeout have an effect.
CANN_HOST_ENTRY(HcclGetCommConfigCapability, "makes")
uint32_t HcclGetCommConfigCapability() { return 12; }

int HcclCommDestroy(void* comm) {
  CANN_HOST_CALL(HcclCommDestroy);
  cann_host::DoAllWork();  // some of it may be with this communicator
  std::shared_ptr<Group> group;
  {
    State& state = GetState();
    const cann_host::Lock lock(state.mutex);
    const auto found = state.groups.find(comm);
    if (found == state.groups.end()) return NoGroup("HcclCommDestroy", comm);
    group = std::move(found->second);
    state.groups.erase(found);
  }
  group->Leave();
  return kOk;
}

int HcclGetCommName(void* comm, char* name) {
  CANN_HOST_CALL(HcclGetCommName);
  const auto group = Find(comm);
  if (!group) return NoGroup("HcclGetCommName", comm);
  if (name == nullptr) return NoPlace("HcclGetCommName");
  std::memcpy(name, group->name().c_str(), group->name().size() + 1);  // into 128 bytes
  return kOk;
}

int HcclGetRankSize(void* comm, uint32_t* size) {
  CANN_HOST_CALL(HcclGetRankSize);
  const auto group = Find(comm);
  if (!group) return NoGroup("HcclGetRankSize", comm);
  if (size == nullptr) return NoPlace("HcclGetRankSize");
  *size = group->ranks();
  return kOk;
}

int HcclGetRankId(void* comm, uint32_t* rank) {
  CANN_HOST_CALL(HcclGetRankId);
  const auto group = Find(comm);
  if (!group) return NoGroup("HcclGetRankId", comm);
  if (rank == nullptr) return NoPlace("HcclGetRankId");
  *rank = group->rank();
  return kOk;
}

// HCCL reports faults of the network here, and torch_npu ends the process at any fault. There is no
// network here: the call that failed, or the wait for its stream, returns the error.
int HcclGetCommAsyncError(void* comm, int* error) {
  CANN_HOST_CALL(HcclGetCommAsyncError);
  if (!Find(comm)) return NoGroup("HcclGetCommAsyncError", comm);
  if (error == nullptr) return NoPlace("HcclGetCommAsyncError");
  *error = kOk;
  return kOk;
}

int HcclAllReduce(void* send, void* receive, uint64_t count, int dtype, int op, void* comm,
                  void* stream) {
  CANN_HOST_CALL(HcclAllReduce);
  const Call call{Kind::kAllReduce, dtype, op, 0, count, {}, {}};
  return Launch("HcclAllReduce", comm, call, {"sendBuf", send, count}, {"recvBuf", receive, count},
                stream);
}

int HcclReduce(void* send, void* receive, uint64_t count, int dtype, int op, uint32_t root,
               void* comm, void* stream) {
  CANN_HOST_CALL(HcclReduce);
  const Call call{Kind::kReduce, dtype, op, root, count, {}, {}};
  return Launch("HcclReduce", comm, call, {"sendBuf", send, count},
                {"recvBuf", receive, RankOf(comm) == root ? count : 0}, stream);
}

int HcclReduceScatter(void* send, void* receive, uint64_t count, int dtype, int op, void* comm,
                      void* stream) {
  CANN_HOST_CALL(HcclReduceScatter);
  const Call call{Kind::kReduceScatter, dtype, op, 0, count, {}, {}};
  return Launch("HcclReduceScatter", comm, call, {"sendBuf", send, count * RanksOf(comm)},
                {"recvBuf", receive, count}, stream);
}

int HcclAllGather(void* send, void* receive, uint64_t count, int dtype, void* comm, void* stream) {
  CANN_HOST_CALL(HcclAllGather);
  const Call call{Kind::kAllGather, dtype, kSum, 0, count, {}, {}};
  return Launch("HcclAllGather", comm, call, {"sendBuf", send, count},
                {"recvBuf", receive, count * RanksOf(comm)}, stream);
}

int HcclBroadcast(void* buffer, uint64_t count, int dtype, uint32_t root, void* comm,
                  void* stream) {
  CANN_HOST_CALL(HcclBroadcast);
  const Call call{Kind::kBroadcast, dtype, kSum, root, count, {}, {}};
  const Buffer both{"buf", buffer, count};
  return Launch("HcclBroadcast", comm, call, both, both, stream);
}

int HcclScatter(void* send, void* receive, uint64_t count, int dtype, uint32_t root, void* comm,
                void* stream) {
  CANN_HOST_CALL(HcclScatter);
  const Call call{Kind::kScatter, dtype, kSum, root, count, {}, {}};
  const uint64_t sends = RankOf(comm) == root ? count * RanksOf(comm) : 0;
  return Launch("HcclScatter", comm, call, {"sendBuf", send, sends}, {"recvBuf", receive, count},
                stream);
}

int HcclAlltoAllV(const void* send, const uint64_t* send_counts, const uint64_t* send_offsets,
                  int send_type, const void* receive, const uint64_t* receive_counts,
                  const uint64_t* receive_offsets, int receive_type, void* comm, void* stream) {
  CANN_HOST_CALL(HcclAlltoAllV);
  return AllToAllV("HcclAlltoAllV", {send, send_counts, send_offsets, send_type},
                   {receive, receive_counts, receive_offsets, receive_type}, comm, stream);
}

int HcclAlltoAll(const void* send, uint64_t send_count, int send_type, const void* receive,
                 uint64_t receive_count, int receive_type, void* comm, void* stream) {
  CANN_HOST_CALL(HcclAlltoAll);
  const std::vector<uint64_t> sends(kMostRanks, send_count), receives(kMostRanks, receive_count);
  return AllToAllV("HcclAlltoAll", {send, sends.data(), nullptr, send_type},
                   {receive, receives.data(), nullptr, receive_type}, comm, stream);
}

// torch_npu makes a communicator for each pair of ranks that send and receive.
int HcclSend(void* data, uint64_t count, int dtype, uint32_t to, void* comm, void* stream) {
  CANN_HOST_CALL(HcclSend);
  return Pair("HcclSend", RankOf(comm), to, {"sendBuf", data, count}, dtype, comm, stream);
}

int HcclRecv(void* data, uint64_t count, int dtype, uint32_t from, void* comm, void* stream) {
  CANN_HOST_CALL(HcclRecv);
  return Pair("HcclRecv", from, from, {"recvBuf", data, count}, dtype, comm, stream);
}

int HcclBarrier(void* comm, void* stream) {
  CANN_HOST_CALL(HcclBarrier);
  return Launch("HcclBarrier", comm, {Kind::kBarrier, kInt8, kSum, 0, 0, {}, {}}, {}, {}, stream);
}

// A collective inside a graph, on memory of the graph engine. `kind` is hccl::Kind.
int cann_host_hccl_run(const char* name, int kind, int dtype, int op, uint32_t root, uint64_t count,
                       const void* send, void* receive) {
  cann_host::DoAllWork();  // earlier launches come first, on every rank
  if (name == nullptr) return Fail(kNullPointer, "a communicator without a name");
  const auto group = Find(std::string(name));
  if (!group) return Fail(kParameter, "there is no communicator %s in this process", name);
  const Call call{static_cast<Kind>(kind), dtype, op, root, count, {}, {}};
  if (const int code = Check(name, *group, call)) return code;
  return group->Run(call, send, receive);
}

uint32_t cann_host_hccl_ranks(const char* name) {
  const auto group = Find(std::string(name));
  return group ? group->ranks() : 0;
}

}  // extern "C"
