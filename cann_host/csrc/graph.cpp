// libgraph: tensors, definitions of operators, and serialized graphs. Python interprets the graphs
// (cann_host/graph).
#include <cstring>
#include <fstream>
#include <set>
#include <string_view>
#include <utility>

#include "bindings.h"
#include "core.h"
#include "ge.h"

namespace {

#define GROUP "Graph engine (ge)"
CANN_HOST_NAMED_ENTRY(ge_load, "ge.load", "does")

// Inputs and attributes of an operator, in the order of its GE definition.
struct OpDefinition {
  std::set<std::string> inputs;
  std::set<std::string> attrs;
};

// The operators that Python has. Leaked on purpose: torchair's own statics still call in while the
// process exits.
struct OpDefinitions {
  cann_host::Mutex mutex;
  std::map<std::string, OpDefinition> by_type;
};

OpDefinitions& GetOpDefinitions() {
  static OpDefinitions* definitions = new OpDefinitions;
  return *definitions;
}
[[maybe_unused]] OpDefinitions& made = GetOpDefinitions();

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

void cann_host_ge_register_op(const char* type, const char* inputs, const char* attrs) {
  OpDefinitions& ops = GetOpDefinitions();
  const cann_host::Lock lock(ops.mutex);
  ops.by_type[type] = {Split(inputs), Split(attrs)};
}

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
std::vector<int64_t> Shape::GetDims() const { return impl_ ? impl_->dims : std::vector<int64_t>{}; }

// ---- Tensors ----

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

// ---- Operators: torchair's checks before it emits an optional input or attribute ----

class OperatorImpl {
 public:
  std::string type;
  OpDefinition definition;
};

bool OperatorFactory::IsExistOp(const char* const type) {
  if (type == nullptr) return false;
  OpDefinitions& ops = GetOpDefinitions();
  const cann_host::Lock lock(ops.mutex);
  return ops.by_type.count(type) != 0;
}
Operator OperatorFactory::CreateOperator(const char* const /*name*/, const char* const type) {
  OpDefinitions& ops = GetOpDefinitions();
  const cann_host::Lock lock(ops.mutex);
  Operator op;
  if (type == nullptr) return op;
  const auto found = ops.by_type.find(type);
  if (found != ops.by_type.end()) {
    op.operator_impl_ = std::make_shared<OperatorImpl>(OperatorImpl{type, found->second});
  }
  return op;
}
graphStatus Operator::UpdateInputDesc(const char* name, const TensorDesc& /*desc*/) {
  if (operator_impl_ == nullptr) return Failed("this operator does not exist");
  if (name == nullptr)
    return Failed("operator %s: an input without a name", operator_impl_->type.c_str());
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
// itself a string or message. False if the bytes are not such a message.
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
  if (cann_host::Fault("ge.load")) return kFailed;
  if (model == nullptr || size == 0) return Failed("the serialized graph is empty");
  auto loaded = std::make_shared<GraphImpl>();
  loaded->model.assign(static_cast<const char*>(model), size);
  if (!ForEachField(loaded->model, kModelGraph, [](std::string_view) {})) {
    return Failed("the serialized graph is not a ModelDef");
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

const std::string& Graph::Model() const {
  static const std::string* empty = new std::string;
  return impl_ ? impl_->model : *empty;
}

}  // namespace ge
