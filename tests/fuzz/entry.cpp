// The way into the graph engine that torchair takes, as plain C for worker.py; and device memory that
// lies at the end of its last page, with pages around it that nobody may touch: what reads or writes
// beyond an allocation, in torch's own kernels too, ends the process.
#include <sys/mman.h>

#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>

#include "core.h"
#include "ge_abi.h"

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kMostDead = 512;  // freed ones that stay out of reach

struct Pages {
  void* begin;
  size_t size;
};

struct Guarded {
  std::mutex mutex;
  std::map<void*, Pages> live;
  std::deque<Pages> dead;
};

Guarded& GetGuarded() {
  static Guarded* guarded = new Guarded;
  return *guarded;
}

}  // namespace

extern "C" {

void __real_free(void* memory);

int __wrap_posix_memalign(void** out, size_t, size_t size) {
  const size_t used = (size + 15) / 16 * 16;  // torch reads 16 bytes at a time from aligned memory
  const size_t inner = (used + kPage - 1) / kPage * kPage;
  if (size == 0 || inner < size) return 1;
  void* begin = mmap(nullptr, inner + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (begin == MAP_FAILED) return 1;
  char* data = static_cast<char*>(begin) + kPage;
  if (mprotect(data, inner, PROT_READ | PROT_WRITE) != 0) return 1;
  *out = data + inner - used;
  std::lock_guard<std::mutex> lock(GetGuarded().mutex);
  GetGuarded().live[*out] = {begin, inner + 2 * kPage};
  return 0;
}

void __wrap_free(void* memory) {
  Guarded& guarded = GetGuarded();
  std::lock_guard<std::mutex> lock(guarded.mutex);
  const auto found = guarded.live.find(memory);
  if (found == guarded.live.end()) return __real_free(memory);
  mprotect(found->second.begin, found->second.size, PROT_NONE);
  guarded.dead.push_back(found->second);
  guarded.live.erase(found);
  if (guarded.dead.size() > kMostDead) {
    munmap(guarded.dead.front().begin, guarded.dead.front().size);
    guarded.dead.pop_front();
  }
}

struct FuzzTensor {
  void* data;
  size_t size;
  int32_t dtype;
  int32_t format;
  int32_t placement;
  int32_t rank;
  int32_t origin_rank;  // -1 for none
  const int64_t* dims;
  const int64_t* origin;
};

// Loads, compiles and runs a graph twice. given: 0 lets GE allocate the outputs, 1 gives memory of the
// summary's sizes, 2 of half of them. Returns how far it came: 1 loaded, 2 compiled, 3 ran.
int fuzz_graph(const void* model, size_t size, const FuzzTensor* inputs, size_t count,
               int on_device, int given) {
  ge::Graph graph("fuzz");
  if (graph.LoadFromSerializedModelArray(model, size) != ge::GRAPH_SUCCESS) return 0;
  for (const ge::GNode& node : graph.GetAllNodes()) {
    ge::AscendString type;
    node.GetType(type);
  }
  ge::Session session({});
  if (session.AddGraph(0, graph, {}) != ge::GRAPH_SUCCESS) return 1;
  if (session.CompileGraph(0) != ge::GRAPH_SUCCESS) return 1;
  std::vector<ge::Shape> shapes;
  std::vector<ge::DataType> dtypes;
  const auto summary = session.GetCompiledGraphSummary(0);
  summary->GetOutputShapes(shapes);
  summary->GetOutputDtypes(dtypes);

  std::vector<ge::Tensor> tensors(count);
  for (size_t i = 0; i < count; ++i) {
    const FuzzTensor& from = inputs[i];
    ge::Tensor& to = tensors[i];
    to.SetDataType(static_cast<ge::DataType>(from.dtype));
    to.SetFormat(static_cast<ge::Format>(from.format));
    to.SetPlacement(static_cast<ge::Placement>(from.placement));
    to.SetShapeDimNum(from.rank);
    for (int32_t d = 0; d < from.rank; ++d) to.SetShapeDim(d, from.dims[d]);
    if (from.origin_rank >= 0) to.SetOriginShapeDimNum(from.origin_rank);
    for (int32_t d = 0; d < from.origin_rank; ++d) to.SetOriginShapeDim(d, from.origin[d]);
    to.SetData(static_cast<uint8_t*>(from.data), from.size, [](uint8_t*) {});
  }
  for (int round = 0; round < 2; ++round) {
    std::vector<ge::Tensor> outputs;
    for (size_t i = 0; given != 0 && summary->IsStatic() && i < shapes.size(); ++i) {
      int64_t bytes = cann_host::DtypeBytes(dtypes[i]);
      for (const int64_t dim : shapes[i].GetDims()) {
        if (__builtin_mul_overflow(bytes, dim, &bytes) || bytes < 0 || bytes > (1 << 24)) bytes = 0;
      }
      bytes /= given;
      if (bytes == 0) break;
      uint8_t* data =
          static_cast<uint8_t*>(on_device ? cann_host::AllocateDevice(bytes) : std::malloc(bytes));
      outputs.emplace_back();
      outputs.back().SetData(data, bytes, [on_device](uint8_t* at) {
        on_device ? cann_host::FreeDevice(at) : std::free(at);
      });
    }
    const ge::Status status = on_device
                                  ? session.RunGraphWithStreamAsync(0, nullptr, tensors, outputs)
                                  : session.RunGraph(0, tensors, outputs);
    if (status != ge::GRAPH_SUCCESS) return 2;
  }
  return session.RemoveGraph(0) == ge::GRAPH_SUCCESS ? 3 : 2;
}

// What aclnnNpuFormatCastCalculateSizeAndFormat gave.
void fuzz_free_dims(const int64_t* dims) { delete[] dims; }

}  // extern "C"
