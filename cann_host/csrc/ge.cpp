// libge_runner: sessions, which compile and run graphs. Python does both (cann_host/graph/engine.py),
// with the functions of cann_host_set_ge_executor.
#include <cstdlib>
#include <utility>

#include "bindings.h"
#include "core.h"
#include "ge.h"
#include "python.h"

using cann_host::Fault;

namespace {

#define GROUP "Graph engine (ge)"
CANN_HOST_NAMED_ENTRY(ge_add, "ge.add", "does")
CANN_HOST_NAMED_ENTRY(ge_compile, "ge.compile", "does")
CANN_HOST_NAMED_ENTRY(ge_run, "ge.run", "does")

// Python functions; pointers are passed as numbers. Each returns 0 for success. A function that fails
// has called cann_host_ge_fail before.
struct Executor {
  cann_host::PythonFunction
      compile;                    // of the model, its size, a cann_host_ge_summary, and a uint64
                                  // for the compiled graph's number
  cann_host::PythonFunction run;  // of the compiled graph's number, cann_host_ge_tensors, how many,
                                  // the dims of all, how many, and a cann_host_ge_outputs
  cann_host::PythonFunction release;  // of the compiled graph's number
};

// Leaked on purpose: torchair's own statics still call in while the process exits.
Executor& GetExecutor() {
  static Executor* executor = new Executor;
  return *executor;
}
[[maybe_unused]] Executor& made_executor = GetExecutor();

unsigned long long Number(const void* pointer) {
  return static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(pointer));
}
unsigned long long Number(uint64_t number) { return number; }

}  // namespace

// Null when the interpreter is about to end.
void cann_host_set_ge_executor(void* compile, void* run, void* release) {
  GetExecutor().compile.Set(compile);
  GetExecutor().run.Set(run);
  GetExecutor().release.Set(release);
}

void cann_host_ge_fail(const char* text) { ge::Failed("%s", text); }

namespace ge {

// ---- Summaries of compiled graphs ----

class CompiledGraphSummary::SummaryData {
 public:
  bool is_static = false;
  std::vector<std::vector<int64_t>> shapes;
  std::vector<DataType> dtypes;
};

namespace {
// torchair allocates these areas for GE and passes them to the memory-base setters. This library stores
// nothing in them, but torchair treats an empty area as a failed allocation.
constexpr size_t kMemorySize = 512;
}  // namespace

CompiledGraphSummary::~CompiledGraphSummary() = default;
bool CompiledGraphSummary::IsStatic() const { return data_->is_static; }
Status CompiledGraphSummary::GetConstMemorySize(size_t& size) const {
  size = kMemorySize;
  return GRAPH_SUCCESS;
}
Status CompiledGraphSummary::GetFeatureMemorySize(size_t& size) const {
  size = kMemorySize;
  return GRAPH_SUCCESS;
}
Status CompiledGraphSummary::GetFixedFeatureMemorySize(size_t& size) const {
  size = kMemorySize;
  return GRAPH_SUCCESS;
}
Status CompiledGraphSummary::GetFeatureMemoryBaseRefreshable(bool& refreshable) const {
  refreshable = false;
  return GRAPH_SUCCESS;
}
Status CompiledGraphSummary::GetOutputShapes(std::vector<Shape>& shapes) const {
  shapes.clear();
  for (const auto& dims : data_->shapes) shapes.emplace_back(dims);
  return GRAPH_SUCCESS;
}
Status CompiledGraphSummary::GetOutputDtypes(std::vector<DataType>& dtypes) const {
  dtypes = data_->dtypes;
  return GRAPH_SUCCESS;
}

// ---- Sessions ----

namespace {

// A graph of a session. The compiled graph belongs to Python and is destroyed with its last user: a
// graph that is removed while another thread runs it exists until the end of the run.
struct SessionGraph {
  explicit SessionGraph(const Graph& source) : graph(source) {}
  ~SessionGraph() {
    const auto& release = GetExecutor().release;
    if (compiled && release) release.Call("ge.release", cann_host::kFailure, "(K)", Number(number));
  }

  Graph graph;
  cann_host::Mutex mutex{cann_host::Holding::kLong};  // of compilation
  bool compiled = false;
  uint64_t number = 0;  // of the compiled graph
  std::shared_ptr<CompiledGraphSummary> summary;
};

struct Sessions {
  cann_host::Mutex mutex;
  uint64_t next = 1;
  std::map<std::pair<uint64_t, uint32_t>, std::shared_ptr<SessionGraph>> graphs;
};

Sessions& GetSessions() {
  static Sessions* sessions = new Sessions;
  return *sessions;
}
[[maybe_unused]] Sessions& made = GetSessions();

std::shared_ptr<SessionGraph> Find(uint64_t session, uint32_t id) {
  Sessions& sessions = GetSessions();
  const cann_host::Lock lock(sessions.mutex);
  const auto found = sessions.graphs.find({session, id});
  if (found != sessions.graphs.end()) return found->second;
  Failed("the session has no graph %u", id);
  return nullptr;
}

Status Exists(uint64_t session, uint32_t id) { return Find(session, id) ? GRAPH_SUCCESS : kFailed; }

}  // namespace
}  // namespace ge

struct cann_host_ge_summary {
  ge::CompiledGraphSummary::SummaryData data;
};

struct cann_host_ge_outputs {
  std::vector<ge::Tensor>& tensors;
  ge::Placement placement;  // of tensors this library allocates
};

extern "C" {

void cann_host_ge_set_static(cann_host_ge_summary* summary, int is_static) {
  summary->data.is_static = is_static != 0;
}

void cann_host_ge_add_output(cann_host_ge_summary* summary, int32_t dtype, const int64_t* dims,
                             size_t dim_count) {
  summary->data.dtypes.push_back(static_cast<ge::DataType>(dtype));
  summary->data.shapes.emplace_back(dims, dims + dim_count);
}

// The memory of a result: the caller's, or memory allocated here if the caller gave none. Null, with
// the reason stored, if the caller's memory has another size.
void* cann_host_ge_output(cann_host_ge_outputs* outputs, size_t index, int32_t dtype,
                          const int64_t* dims, size_t dim_count, size_t size) {
  if (outputs->tensors.size() <= index) outputs->tensors.resize(index + 1);
  ge::TensorImpl& tensor = outputs->tensors[index].Impl();
  if (tensor.data == nullptr) {
    const size_t bytes = size == 0 ? 1 : size;  // an empty tensor has an address too
    if (outputs->placement == ge::kPlacementDevice) {
      void* data = cann_host::AllocateDevice(bytes);
      if (data == nullptr) return nullptr;
      tensor.Set(static_cast<uint8_t*>(data), size, [](uint8_t* at) { cann_host::FreeDevice(at); });
    } else {
      void* data = std::malloc(bytes);
      if (data == nullptr) {
        ge::Failed("out of memory: %zu bytes for output %zu", size, index);
        return nullptr;
      }
      tensor.Set(static_cast<uint8_t*>(data), size, [](uint8_t* at) { std::free(at); });
    }
    tensor.desc.placement = outputs->placement;
  } else if (tensor.desc.placement == ge::kPlacementDevice &&
             !cann_host::IsAllocated(tensor.data, size)) {
    ge::Failed("output %zu: %zu bytes at %p do not lie in memory that was allocated here", index,
               size, static_cast<void*>(tensor.data));
    return nullptr;
  } else if (tensor.size != size) {
    ge::Failed("output %zu takes %zu bytes but %zu were provided", index, size, tensor.size);
    return nullptr;
  }
  tensor.desc.dtype = static_cast<ge::DataType>(dtype);
  tensor.desc.dims.assign(dims, dims + dim_count);
  tensor.desc.origin_dims = tensor.desc.dims;
  tensor.desc.has_origin = true;
  return tensor.data;
}

}  // extern "C"

namespace ge {
namespace {

Status Compile(SessionGraph& graph) {
  const cann_host::Lock lock(graph.mutex);
  if (graph.compiled) return GRAPH_SUCCESS;
  if (Fault("ge.compile")) return kFailed;
  const std::string& model = graph.graph.Model();
  cann_host_ge_summary summary;
  const int code =
      GetExecutor().compile.Call("ge.compile", cann_host::kFailure, "(KKKK)", Number(model.data()),
                                 Number(model.size()), Number(&summary), Number(&graph.number));
  if (code != 0) return kFailed;
  graph.summary = std::make_shared<CompiledGraphSummary>(
      std::make_shared<CompiledGraphSummary::SummaryData>(std::move(summary.data)));
  graph.compiled = true;
  return GRAPH_SUCCESS;
}

Status Run(uint64_t session, uint32_t id, const std::vector<Tensor>& inputs,
           std::vector<Tensor>& outputs, Placement placement) {
  if (Fault("ge.run")) return kFailed;
  const std::shared_ptr<SessionGraph> graph = Find(session, id);
  if (graph == nullptr || Compile(*graph) != GRAPH_SUCCESS) return kFailed;
  std::vector<cann_host_ge_tensor> views;
  std::vector<int64_t> dims;
  views.reserve(inputs.size());
  for (const Tensor& input : inputs) {
    const TensorImpl& tensor = input.Impl();
    const TensorDescImpl& desc = tensor.desc;
    // torchair passes the bytes of the shape that torch sees; a FRACTAL_NZ storage has more.
    const size_t size =
        desc.placement == kPlacementDevice ? cann_host::BytesAt(tensor.data) : tensor.size;
    views.push_back({tensor.data, size, desc.dtype, desc.format,
                     static_cast<int32_t>(desc.dims.size()),
                     static_cast<int32_t>(desc.origin_dims.size()), desc.has_origin, desc.placement,
                     dims.size()});
    dims.insert(dims.end(), desc.dims.begin(), desc.dims.end());
    dims.insert(dims.end(), desc.origin_dims.begin(), desc.origin_dims.end());
  }
  cann_host_ge_outputs sink{outputs, placement};
  const int code = GetExecutor().run.Call(
      "ge.run", cann_host::kFailure, "(KKKKKK)", Number(graph->number), Number(views.data()),
      Number(views.size()), Number(dims.data()), Number(dims.size()), Number(&sink));
  for (ge::Tensor& output : outputs) cann_host::NoteWrite(output.Impl().data, output.Impl().size);
  return code == 0 ? GRAPH_SUCCESS : kFailed;
}

}  // namespace

Session::Session(const Options& /*options*/) {
  Sessions& sessions = GetSessions();
  const cann_host::Lock lock(sessions.mutex);
  sessionId_ = sessions.next++;
}
Session::~Session() {
  std::vector<std::shared_ptr<SessionGraph>> gone;  // released after the lock is
  Sessions& sessions = GetSessions();
  const cann_host::Lock lock(sessions.mutex);
  const auto first = sessions.graphs.lower_bound({sessionId_, 0});
  const auto last = sessions.graphs.lower_bound({sessionId_ + 1, 0});
  for (auto it = first; it != last; ++it) gone.push_back(std::move(it->second));
  sessions.graphs.erase(first, last);
}
Status Session::AddGraph(uint32_t id, const Graph& graph, const Options& /*options*/) {
  if (Fault("ge.add")) return kFailed;
  Sessions& sessions = GetSessions();
  const cann_host::Lock lock(sessions.mutex);
  const bool added =
      sessions.graphs.try_emplace({sessionId_, id}, std::make_shared<SessionGraph>(graph)).second;
  return added ? GRAPH_SUCCESS : Failed("the session already has a graph %u", id);
}
Status Session::CompileGraph(uint32_t id) {
  const auto graph = Find(sessionId_, id);
  return graph ? Compile(*graph) : kFailed;
}
std::shared_ptr<CompiledGraphSummary> Session::GetCompiledGraphSummary(uint32_t id) {
  const auto graph = Find(sessionId_, id);
  return graph ? graph->summary : nullptr;
}
Status Session::RemoveGraph(uint32_t id) {
  std::shared_ptr<SessionGraph> gone = Find(sessionId_, id);
  if (gone == nullptr) return kFailed;
  Sessions& sessions = GetSessions();
  const cann_host::Lock lock(sessions.mutex);
  sessions.graphs.erase({sessionId_, id});
  return GRAPH_SUCCESS;
}
Status Session::RunGraph(uint32_t id, const std::vector<Tensor>& inputs,
                         std::vector<Tensor>& outputs) {
  return Run(sessionId_, id, inputs, outputs, kPlacementHost);
}
Status Session::RunGraphWithStreamAsync(uint32_t id, void* stream,
                                        const std::vector<Tensor>& inputs,
                                        std::vector<Tensor>& outputs) {
  // A graph runs immediately, after the work before it on its stream.
  if (cann_host::FinishStream("RunGraphWithStreamAsync", stream) != cann_host::kSuccess) {
    return kFailed;
  }
  return Run(sessionId_, id, inputs, outputs, kPlacementDevice);
}

// The executor keeps constants and intermediate results in torch's own memory, so the areas that
// torchair provides stay unused; these functions only accept them.
Status Session::SetGraphConstMemoryBase(uint32_t id, const void* const, size_t) {
  return Exists(sessionId_, id);
}
Status Session::SetGraphFixedFeatureMemoryBase(uint32_t id, const void* const, size_t) {
  return Exists(sessionId_, id);
}
Status Session::UpdateGraphFeatureMemoryBase(uint32_t id, const void* const, size_t) {
  return Exists(sessionId_, id);
}
Status Session::UpdateGraphRefreshableFeatureMemoryBase(uint32_t id, const void* const, size_t) {
  return Exists(sessionId_, id);
}
Status Session::RegisterExternalAllocator(const void* const, std::shared_ptr<Allocator>) const {
  return GRAPH_SUCCESS;
}

Status GEInitialize(const Options& /*options*/) { return GRAPH_SUCCESS; }
Status GEFinalize() { return GRAPH_SUCCESS; }
AscendString GEGetWarningMsgV2() { return AscendString(""); }

}  // namespace ge
