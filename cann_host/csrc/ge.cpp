// GE: keeps graphs, tensors and sessions. What a graph means is decided in Python
// (cann_host/executor.py), reached through the functions of cann_host_set_ge_executor.
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <set>
#include <string_view>
#include <utility>

#include "core.h"
#include "python.h"
#include "ge_abi.h"

using cann_host::Fault;

namespace {

#define GROUP "Graph engine (ge)"
CANN_HOST_NAMED_ENTRY(ge_load, "ge.load", "does")
CANN_HOST_NAMED_ENTRY(ge_add, "ge.add", "does")
CANN_HOST_NAMED_ENTRY(ge_compile, "ge.compile", "does")
CANN_HOST_NAMED_ENTRY(ge_run, "ge.run", "does")

// GE reports success and failure; the code it fails with carries no meaning to torchair.
constexpr ge::Status kFailed = ge::GRAPH_FAILED;

template <typename... Args>
ge::Status Failed(const char* fmt, Args... args) {
  cann_host::Fail(cann_host::kFailure, fmt, args...);
  return kFailed;
}

}  // namespace

// ---- What Python sees. Plain C; cann_host/ge.py declares the same with ctypes. ----

extern "C" {

struct cann_host_ge_tensor {
  void* data;
  size_t size;  // bytes that may be read at data
  int32_t dtype;
  int32_t format;
  int32_t dim_count;         // storage shape: of the format
  int32_t origin_dim_count;  // the shape torch sees; 0 with `has_origin` 0 if nobody set it
  int32_t has_origin;
  int32_t placement;
  const int64_t* dims;
  const int64_t* origin_dims;
};

struct cann_host_ge_summary;
struct cann_host_ge_outputs;

}  // extern "C"

namespace {

// Python functions; pointers go as numbers. Each returns 0 for success. A failing one has called
// cann_host_ge_fail before.
struct Executor {
  cann_host::PythonFunction compile;  // of the model, its size, a cann_host_ge_summary, a uint64 for
                                      // the plan's number
  cann_host::PythonFunction run;      // of the plan, cann_host_ge_tensors, how many, a
                                      // cann_host_ge_outputs
  cann_host::PythonFunction release;  // of the plan
};

unsigned long long Number(const void* pointer) {
  return static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(pointer));
}
unsigned long long Number(uint64_t number) { return number; }

// Inputs and attributes of an operator, in the order of its GE definition.
struct OpDefinition {
  std::set<std::string> inputs;
  std::set<std::string> attrs;
};

// Leaked on purpose: torchair's own statics still call in while the process exits.
struct State {
  cann_host::Mutex mutex;
  Executor executor;
  std::map<std::string, OpDefinition> ops;
};

State& GetState() {
  static State* state = new State;
  return *state;
}
[[maybe_unused]] State& made = GetState();

Executor& GetExecutor() { return GetState().executor; }

std::set<std::string> Split(const char* names) {
  std::set<std::string> result;
  for (std::string_view rest = names; !rest.empty();) {
    const size_t end = rest.find(',');
    result.emplace(rest.substr(0, end));
    rest = end == std::string_view::npos ? "" : rest.substr(end + 1);
  }
  return result;
}

}  // namespace

extern "C" {

// Null when the interpreter is about to end.
void cann_host_set_ge_executor(void* compile, void* run, void* release) {
  GetExecutor().compile.Set(compile);
  GetExecutor().run.Set(run);
  GetExecutor().release.Set(release);
}

void cann_host_ge_register_op(const char* type, const char* inputs, const char* attrs) {
  State& state = GetState();
  const cann_host::Lock lock(state.mutex);
  state.ops[type] = {Split(inputs), Split(attrs)};
}

void cann_host_ge_fail(const char* text) { Failed("%s", text); }

}  // extern "C"

namespace ge {

// ---- Strings and shapes ----

AscendString::AscendString(const char* text) {
  if (text != nullptr) name_ = std::make_shared<std::string>(text);
}
const char* AscendString::GetString() const { return name_ ? name_->c_str() : ""; }
bool AscendString::operator<(const AscendString& other) const {
  return std::strcmp(GetString(), other.GetString()) < 0;
}
bool AscendString::operator==(const AscendString& other) const {
  return std::strcmp(GetString(), other.GetString()) == 0;
}

const char* GetFormatName(Format format) {
  if (format == FORMAT_ND) return "ND";
  if (format == FORMAT_FRACTAL_NZ) return "FRACTAL_NZ";
  thread_local std::string name;
  name = "FORMAT_" + std::to_string(static_cast<int>(format));
  return name.c_str();
}

class ShapeImpl {
 public:
  std::vector<int64_t> dims;
};

Shape::Shape(const std::vector<int64_t>& dims) : impl_(std::make_shared<ShapeImpl>()) {
  impl_->dims = dims;
}
std::vector<int64_t> Shape::GetDims() const {
  return impl_ ? impl_->dims : std::vector<int64_t>{};
}

// ---- Tensors ----

class TensorDescImpl {
 public:
  std::vector<int64_t> dims;
  std::vector<int64_t> origin_dims;
  bool has_origin = false;
  Format format = FORMAT_ND;
  Format origin_format = FORMAT_ND;
  DataType dtype = DT_FLOAT;
  Placement placement = kPlacementHost;
};

TensorDesc::TensorDesc() : impl(std::make_shared<TensorDescImpl>()) {}
TensorDesc::TensorDesc(const TensorDescImpl& other)
    : impl(std::make_shared<TensorDescImpl>(other)) {}
TensorDesc::TensorDesc(const TensorDesc& other) : TensorDesc(*other.impl) {}
TensorDesc& TensorDesc::operator=(const TensorDesc& other) {
  *impl = *other.impl;
  return *this;
}
Shape TensorDesc::GetShape() const { return Shape(impl->dims); }
void TensorDesc::SetShape(const Shape& shape) { impl->dims = shape.GetDims(); }
void TensorDesc::SetOriginShape(const Shape& shape) {
  impl->origin_dims = shape.GetDims();
  impl->has_origin = true;
}
Format TensorDesc::GetFormat() const { return impl->format; }
void TensorDesc::SetFormat(Format format) { impl->format = format; }
void TensorDesc::SetOriginFormat(Format format) { impl->origin_format = format; }
DataType TensorDesc::GetDataType() const { return impl->dtype; }
void TensorDesc::SetDataType(DataType dtype) { impl->dtype = dtype; }
Placement TensorDesc::GetPlacement() const { return impl->placement; }
void TensorDesc::SetPlacement(Placement placement) { impl->placement = placement; }

class TensorImpl {
 public:
  ~TensorImpl() { Set(nullptr, 0, nullptr); }
  void Set(uint8_t* bytes, size_t byte_count, const Tensor::DeleteFunc& with) {
    if (data != nullptr && deleter) deleter(data);
    data = bytes;
    size = byte_count;
    deleter = with;
  }

  TensorDescImpl desc;
  uint8_t* data = nullptr;
  size_t size = 0;
  Tensor::DeleteFunc deleter;
};

Tensor::Tensor() : impl(std::make_shared<TensorImpl>()) {}
TensorDesc Tensor::GetTensorDesc() const { return TensorDesc(impl->desc); }
graphStatus Tensor::SetTensorDesc(const TensorDesc& desc) {
  impl->desc = desc.Impl();
  return GRAPH_SUCCESS;
}
const uint8_t* Tensor::GetData() const { return impl->data; }
uint8_t* Tensor::GetData() { return impl->data; }
std::unique_ptr<uint8_t[], Tensor::DeleteFunc> Tensor::ResetData() {
  DeleteFunc deleter = impl->deleter ? impl->deleter : [](uint8_t*) {};
  std::unique_ptr<uint8_t[], DeleteFunc> data(impl->data, std::move(deleter));
  impl->data = nullptr;
  impl->size = 0;
  return data;
}
graphStatus Tensor::ResetData(uint8_t* data, size_t size, const DeleteFunc& deleter) {
  return SetData(data, size, deleter);
}
graphStatus Tensor::SetData(uint8_t* data, size_t size, const DeleteFunc& deleter) {
  impl->Set(data, size, deleter);
  return GRAPH_SUCCESS;
}
graphStatus Tensor::SetOriginShapeDimNum(const size_t count) {
  impl->desc.origin_dims.resize(count);
  impl->desc.has_origin = true;
  return GRAPH_SUCCESS;
}
size_t Tensor::GetOriginShapeDimNum() const { return impl->desc.origin_dims.size(); }
graphStatus Tensor::SetOriginShapeDim(const size_t index, const int64_t dim) {
  if (index >= impl->desc.origin_dims.size()) return Failed("tensor has no dim %zu", index);
  impl->desc.origin_dims[index] = dim;
  return GRAPH_SUCCESS;
}
graphStatus Tensor::SetShapeDimNum(const size_t count) {
  impl->desc.dims.resize(count);
  return GRAPH_SUCCESS;
}
size_t Tensor::GetShapeDimNum() const { return impl->desc.dims.size(); }
graphStatus Tensor::SetShapeDim(const size_t index, const int64_t dim) {
  if (index >= impl->desc.dims.size()) return Failed("tensor has no dim %zu", index);
  impl->desc.dims[index] = dim;
  return GRAPH_SUCCESS;
}
int64_t Tensor::GetShapeDim(const size_t index) const {
  return index < impl->desc.dims.size() ? impl->desc.dims[index] : 0;
}
graphStatus Tensor::SetFormat(const Format& format) {
  impl->desc.format = format;
  return GRAPH_SUCCESS;
}
Format Tensor::GetFormat() const { return impl->desc.format; }
graphStatus Tensor::SetDataType(const DataType& dtype) {
  impl->desc.dtype = dtype;
  return GRAPH_SUCCESS;
}
DataType Tensor::GetDataType() const { return impl->desc.dtype; }
graphStatus Tensor::SetPlacement(const Placement& placement) {
  impl->desc.placement = placement;
  return GRAPH_SUCCESS;
}
Placement Tensor::GetPlacement() const { return impl->desc.placement; }

// ---- Operators: what torchair asks before it emits an optional input or attribute ----

class OperatorImpl {
 public:
  std::string type;
  OpDefinition definition;
};

bool OperatorFactory::IsExistOp(const char* const type) {
  if (type == nullptr) return false;
  State& state = GetState();
  const cann_host::Lock lock(state.mutex);
  return state.ops.count(type) != 0;
}
Operator OperatorFactory::CreateOperator(const char* const /*name*/, const char* const type) {
  State& state = GetState();
  const cann_host::Lock lock(state.mutex);
  Operator op;
  if (type == nullptr) return op;
  const auto found = state.ops.find(type);
  if (found != state.ops.end()) {
    op.operator_impl_ = std::make_shared<OperatorImpl>(OperatorImpl{type, found->second});
  }
  return op;
}
graphStatus Operator::UpdateInputDesc(const char* name, const TensorDesc& /*desc*/) {
  if (operator_impl_ == nullptr) return Failed("this operator does not exist");
  if (name == nullptr) return Failed("operator %s: an input without a name",
                                     operator_impl_->type.c_str());
  if (operator_impl_->definition.inputs.count(name) != 0) return GRAPH_SUCCESS;
  return Failed("operator %s has no input %s", operator_impl_->type.c_str(), name);
}
graphStatus Operator::GetAllIrAttrNamesAndTypes(Options& attrs) const {
  if (operator_impl_ == nullptr) return Failed("this operator does not exist");
  for (const std::string& name : operator_impl_->definition.attrs) attrs[name.c_str()] = "";
  return GRAPH_SUCCESS;
}

// ---- Graphs: the serialized ModelDef as torchair made it ----

class GraphImpl {
 public:
  std::string name;
  std::string model;
};

class NodeImpl {
 public:
  std::string type;
};

namespace {

// Calls `each` with the bytes of every field `number` of a serialized protobuf message that is
// itself a string or message. False if the bytes are no such message.
template <typename F>
bool ForEachField(std::string_view message, uint64_t number, F each) {
  auto varint = [&message](uint64_t& value) {
    value = 0;
    for (int shift = 0; shift < 64 && !message.empty(); shift += 7) {
      const auto byte = static_cast<uint8_t>(message.front());
      message.remove_prefix(1);
      value |= static_cast<uint64_t>(byte & 0x7F) << shift;
      if (byte < 0x80) return true;
    }
    return false;
  };
  while (!message.empty()) {
    uint64_t tag = 0;
    uint64_t length = 0;
    if (!varint(tag)) return false;
    switch (tag & 7) {
      case 0:  // a number
        if (!varint(length)) return false;
        continue;
      case 1:
        length = 8;
        break;
      case 2:
        if (!varint(length)) return false;
        break;
      case 5:
        length = 4;
        break;
      default:
        return false;
    }
    if (length > message.size()) return false;
    if (tag == (number << 3 | 2)) each(message.substr(0, length));
    message.remove_prefix(length);
  }
  return true;
}

// Field numbers of torchair's ge_ir.proto.
constexpr uint64_t kModelGraph = 7;
constexpr uint64_t kGraphOp = 6;
constexpr uint64_t kOpType = 2;

}  // namespace

Graph::Graph(const char* name) : impl_(std::make_shared<GraphImpl>()) {
  if (name != nullptr) impl_->name = name;
}

graphStatus Graph::LoadFromSerializedModelArray(const void* model, size_t size) {
  if (Fault("ge.load")) return kFailed;
  if (model == nullptr || size == 0) return Failed("the serialized graph is empty");
  auto loaded = std::make_shared<GraphImpl>();
  loaded->model.assign(static_cast<const char*>(model), size);
  if (!ForEachField(loaded->model, kModelGraph, [](std::string_view) {})) {
    return Failed("the serialized graph is no ModelDef");
  }
  impl_ = std::move(loaded);
  return GRAPH_SUCCESS;
}
graphStatus Graph::SaveToFile(const char* path) const {
  if (path == nullptr) return Failed("there is no file to save the graph to");
  if (impl_ == nullptr) return Failed("there is no graph to save to %s", path);
  std::ofstream file(path, std::ios::binary);
  file << impl_->model;
  file.close();
  return file ? GRAPH_SUCCESS : Failed("cannot write the graph to %s", path);
}
std::vector<GNode> Graph::GetAllNodes() const {
  std::vector<GNode> nodes;
  if (impl_ == nullptr) return nodes;
  ForEachField(impl_->model, kModelGraph, [&nodes](std::string_view graph) {
    ForEachField(graph, kGraphOp, [&nodes](std::string_view op) {
      GNode node;
      node.impl_ = std::make_shared<NodeImpl>();
      ForEachField(op, kOpType, [&node](std::string_view type) { node.impl_->type = type; });
      nodes.push_back(std::move(node));
    });
  });
  return nodes;
}
graphStatus Graph::CopyFrom(const Graph& other) {
  impl_ = other.impl_ ? std::make_shared<GraphImpl>(*other.impl_) : nullptr;
  return GRAPH_SUCCESS;
}
graphStatus GNode::GetType(AscendString& type) const {
  if (impl_ == nullptr) return Failed("this node does not exist");
  type = AscendString(impl_->type.c_str());
  return GRAPH_SUCCESS;
}

// ---- Summaries of compiled graphs ----

class CompiledGraphSummary::SummaryData {
 public:
  bool is_static = false;
  std::vector<std::vector<int64_t>> shapes;
  std::vector<DataType> dtypes;
};

namespace {
// torchair allocates these areas for GE and hands them back through the memory-base setters.
// Nothing is kept in them here, but torchair takes an empty one for a failed allocation.
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

// A graph of a session. The plan belongs to Python and goes when the last user lets go of it, so
// a graph removed while it runs on another thread stays whole until then.
struct SessionGraph {
  explicit SessionGraph(const Graph& source) : graph(source) {}
  ~SessionGraph() {
    const auto& release = GetExecutor().release;
    if (compiled && release) release.Call("ge.release", cann_host::kFailure, "(K)", Number(plan));
  }

  Graph graph;
  cann_host::Mutex mutex{cann_host::Holding::kLong};  // of compilation
  bool compiled = false;
  uint64_t plan = 0;
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

Status Exists(uint64_t session, uint32_t id) {
  return Find(session, id) ? GRAPH_SUCCESS : kFailed;
}

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

size_t cann_host_ge_output_count(cann_host_ge_outputs* outputs) { return outputs->tensors.size(); }

// Where the result of an output goes: the caller's memory, or memory allocated here if the caller
// gave none. Null, with the reason kept, if the caller's memory is of another size.
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
        Failed("out of memory: %zu bytes for output %zu", size, index);
        return nullptr;
      }
      tensor.Set(static_cast<uint8_t*>(data), size, [](uint8_t* at) { std::free(at); });
    }
    tensor.desc.placement = outputs->placement;
  } else if (tensor.desc.placement == ge::kPlacementDevice &&
             !cann_host::IsAllocated(tensor.data, size)) {
    Failed("output %zu: %zu bytes at %p do not lie in memory that was allocated here", index, size,
           static_cast<void*>(tensor.data));
    return nullptr;
  } else if (tensor.size != size) {
    Failed("output %zu takes %zu bytes but %zu were provided", index, size, tensor.size);
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
  const int code = GetExecutor().compile.Call("ge.compile", cann_host::kFailure, "(KKKK)",
                                              Number(model.data()), Number(model.size()),
                                              Number(&summary), Number(&graph.plan));
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
  views.reserve(inputs.size());
  for (const Tensor& input : inputs) {
    const TensorImpl& tensor = input.Impl();
    const TensorDescImpl& desc = tensor.desc;
    // torchair gives the bytes of the shape torch sees, which a FRACTAL_NZ storage has more of.
    const size_t size =
        desc.placement == kPlacementDevice ? cann_host::BytesAt(tensor.data) : tensor.size;
    views.push_back({tensor.data, size, desc.dtype, desc.format,
                     static_cast<int32_t>(desc.dims.size()),
                     static_cast<int32_t>(desc.origin_dims.size()), desc.has_origin,
                     desc.placement, desc.dims.data(), desc.origin_dims.data()});
  }
  cann_host_ge_outputs sink{outputs, placement};
  const int code = GetExecutor().run.Call("ge.run", cann_host::kFailure, "(KKKK)",
                                          Number(graph->plan), Number(views.data()),
                                          Number(views.size()), Number(&sink));
  return code == 0 ? GRAPH_SUCCESS : kFailed;
}

}  // namespace

const std::string& Graph::Model() const {
  static const std::string* empty = new std::string;
  return impl_ ? impl_->model : *empty;
}

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
  // A graph runs at once, after what is before it on its stream.
  if (cann_host::FinishStream("RunGraphWithStreamAsync", stream) != cann_host::kSuccess) {
    return kFailed;
  }
  return Run(sessionId_, id, inputs, outputs, kPlacementDevice);
}

// The executor keeps constants and intermediate results in torch's own memory, so the areas
// torchair provides stay unused; accepting them is all there is to do.
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
