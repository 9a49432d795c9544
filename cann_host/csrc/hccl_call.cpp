// The call of a collective: what each rank sends and receives, and whether the ranks' calls match.
#include <algorithm>
#include <numeric>

#include "hccl.h"

namespace cann_host {
namespace hccl {
namespace {

uint64_t Total(const std::array<uint64_t, kMostRanks>& counts, uint32_t first) {
  return std::accumulate(counts.begin(), counts.begin() + first, uint64_t{0});
}

bool IsSame(const Call& a, const Call& b) {
  return a.kind == b.kind && a.dtype == b.dtype && a.op == b.op && a.root == b.root &&
         a.count == b.count;
}

bool IsTooLarge(const Call& call) {
  const auto is_large = [](uint64_t count) { return count > kMostElements; };
  return is_large(call.count) || std::any_of(call.sends.begin(), call.sends.end(), is_large) ||
         std::any_of(call.receives.begin(), call.receives.end(), is_large);
}

}  // namespace

std::string Text(const Call& call) {
  static const char* const names[] = {
      "HcclAllReduce", "HcclReduce",   "HcclReduceScatter",     "HcclAllGather", "HcclBroadcast",
      "HcclScatter",   "HcclAlltoAll", "HcclSend and HcclRecv", "HcclBarrier"};
  std::string text = names[static_cast<int>(call.kind)];
  if (call.kind == Kind::kBarrier) return text;
  text += "(";
  if (call.kind != Kind::kAllToAll) text += std::to_string(call.count) + " ";
  text += Name(call.dtype);
  if (IsReduction(call)) text += std::string(", ") + OpName(call.op);
  if (call.kind == Kind::kReduce || call.kind == Kind::kBroadcast || call.kind == Kind::kScatter ||
      call.kind == Kind::kSend) {
    text += (call.kind == Kind::kSend ? ", from rank " : ", root ") + std::to_string(call.root);
  }
  return text + ")";
}

bool IsReduction(const Call& call) {
  return call.kind == Kind::kAllReduce || call.kind == Kind::kReduce ||
         call.kind == Kind::kReduceScatter;
}

uint64_t Gives(const Call& call, uint32_t rank, uint32_t ranks) {
  switch (call.kind) {
    case Kind::kAllReduce:
    case Kind::kReduce:
    case Kind::kAllGather:
      return call.count;
    case Kind::kReduceScatter:
      return call.count * ranks;
    case Kind::kSend:
    case Kind::kBroadcast:
      return rank == call.root ? call.count : 0;
    case Kind::kScatter:
      return rank == call.root ? call.count * ranks : 0;
    case Kind::kAllToAll:
      return Total(call.sends, ranks);
    default:
      return 0;
  }
}

uint64_t Gets(const Call& call, uint32_t rank, uint32_t ranks) {
  switch (call.kind) {
    case Kind::kAllReduce:
    case Kind::kReduceScatter:
    case Kind::kScatter:
      return call.count;
    case Kind::kReduce:
      return rank == call.root ? call.count : 0;
    case Kind::kSend:
    case Kind::kBroadcast:
      return rank == call.root ? 0 : call.count;
    case Kind::kAllGather:
      return call.count * ranks;
    case Kind::kAllToAll:
      return Total(call.receives, ranks);
    default:
      return 0;
  }
}

std::vector<std::pair<uint64_t, uint64_t>> Pieces(const std::vector<Call>& calls, uint32_t rank) {
  const Call& call = calls[rank];
  const auto ranks = static_cast<uint32_t>(calls.size());
  if (call.kind == Kind::kReduceScatter || call.kind == Kind::kScatter) {
    return {{call.count * rank, call.count}};
  }
  if (call.kind != Kind::kAllToAll) return {{0, Gets(call, rank, ranks)}};
  std::vector<std::pair<uint64_t, uint64_t>> pieces;
  uint64_t first = 0;
  for (const Call& from : calls) {
    pieces.push_back({first + Total(from.sends, rank), from.sends[rank]});
    first += Total(from.sends, ranks);
  }
  return pieces;
}

std::string Difference(const std::vector<Call>& calls) {
  for (size_t rank = 1; rank < calls.size(); ++rank) {
    if (IsTooLarge(calls[rank]))
      return "rank " + std::to_string(rank) + " has counts that are not valid";
    if (!IsSame(calls[0], calls[rank])) {
      return "rank 0 calls " + Text(calls[0]) + ", rank " + std::to_string(rank) + " " +
             Text(calls[rank]);
    }
  }
  if (calls[0].kind != Kind::kAllToAll) return "";
  for (size_t from = 0; from < calls.size(); ++from) {
    for (size_t to = 0; to < calls.size(); ++to) {
      const uint64_t given = calls[from].sends[to], taken = calls[to].receives[from];
      if (given == taken) continue;
      return "in " + Text(calls[0]) + " rank " + std::to_string(from) + " sends " +
             std::to_string(given) + " elements to rank " + std::to_string(to) +
             ", which expects " + std::to_string(taken);
    }
  }
  return "";
}

}  // namespace hccl
}  // namespace cann_host
