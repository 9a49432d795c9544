// The part of CANN's graph engine (GE) interface that torchair links against: names, layouts and
// virtual tables as in the headers torch_npu ships (include/graph, include/ge), nothing more.
// tests/cann_host/test_cann_host_abi.py compares the two.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace ge {

using Status = uint32_t;
using graphStatus = uint32_t;
constexpr graphStatus GRAPH_SUCCESS = 0;
constexpr graphStatus GRAPH_FAILED = 0xFFFFFFFF;

// Only the values this library itself uses; the rest passes through as numbers.
enum DataType : int {
  DT_FLOAT = 0,
  DT_UNDEFINED = 28,
  DT_INT4 = 29,
  DT_MAX = 42,
};
enum Format : int { FORMAT_ND = 2, FORMAT_FRACTAL_NZ = 29 };
enum Placement : int { kPlacementHost = 0, kPlacementDevice = 1 };

const char* GetFormatName(Format format);

class AscendString {
 public:
  AscendString() = default;
  AscendString(const char* text);
  const char* GetString() const;
  bool operator<(const AscendString& other) const;
  bool operator==(const AscendString& other) const;

 private:
  std::shared_ptr<std::string> name_;
};

using Options = std::map<AscendString, AscendString>;

class ShapeImpl;
class Shape {
 public:
  Shape() = default;
  explicit Shape(const std::vector<int64_t>& dims);
  std::vector<int64_t> GetDims() const;

 private:
  std::shared_ptr<ShapeImpl> impl_;
};

class TensorDescImpl;
class TensorDesc {
 public:
  TensorDesc();
  TensorDesc(const TensorDesc& other);
  TensorDesc& operator=(const TensorDesc& other);
  Shape GetShape() const;
  void SetShape(const Shape& shape);
  void SetOriginShape(const Shape& shape);
  Format GetFormat() const;
  void SetFormat(Format format);
  void SetOriginFormat(Format format);
  DataType GetDataType() const;
  void SetDataType(DataType dtype);
  Placement GetPlacement() const;
  void SetPlacement(Placement placement);

  // Not part of GE's interface: how tensors read and write descriptions.
  explicit TensorDesc(const TensorDescImpl& impl);
  TensorDescImpl& Impl() const { return *impl; }

 private:
  std::shared_ptr<TensorDescImpl> impl;
};

class TensorImpl;
class Tensor {
 public:
  using DeleteFunc = std::function<void(uint8_t*)>;
  Tensor();
  TensorDesc GetTensorDesc() const;
  graphStatus SetTensorDesc(const TensorDesc& desc);
  const uint8_t* GetData() const;
  uint8_t* GetData();
  std::unique_ptr<uint8_t[], DeleteFunc> ResetData();
  graphStatus ResetData(uint8_t* data, size_t size, const DeleteFunc& deleter);
  graphStatus SetData(uint8_t* data, size_t size, const DeleteFunc& deleter);
  graphStatus SetOriginShapeDimNum(const size_t count);
  size_t GetOriginShapeDimNum() const;
  graphStatus SetOriginShapeDim(const size_t index, const int64_t dim);
  graphStatus SetShapeDimNum(const size_t count);
  size_t GetShapeDimNum() const;
  graphStatus SetShapeDim(const size_t index, const int64_t dim);
  int64_t GetShapeDim(const size_t index) const;
  graphStatus SetFormat(const Format& format);
  Format GetFormat() const;
  graphStatus SetDataType(const DataType& dtype);
  DataType GetDataType() const;
  graphStatus SetPlacement(const Placement& placement);
  Placement GetPlacement() const;

  // Not part of GE's interface: what the session needs.
  TensorImpl& Impl() const { return *impl; }

 private:
  std::shared_ptr<TensorImpl> impl;
};

class OperatorImpl;
class Operator {
 public:
  Operator() = default;
  virtual ~Operator() = default;
  graphStatus UpdateInputDesc(const char* name, const TensorDesc& desc);
  graphStatus GetAllIrAttrNamesAndTypes(Options& attrs) const;

 private:
  friend class OperatorFactory;
  std::shared_ptr<OperatorImpl> operator_impl_;
};

class OperatorFactory {
 public:
  static Operator CreateOperator(const char* const name, const char* const type);
  static bool IsExistOp(const char* const type);
};

class NodeImpl;
class GNode {
 public:
  GNode() = default;
  graphStatus GetType(AscendString& type) const;

 private:
  friend class Graph;
  std::shared_ptr<NodeImpl> impl_;
};

class GraphImpl;
class Graph {
 public:
  Graph() = default;
  explicit Graph(const char* name);
  graphStatus LoadFromSerializedModelArray(const void* model, size_t size);
  graphStatus SaveToFile(const char* path) const;
  std::vector<GNode> GetAllNodes() const;
  graphStatus CopyFrom(const Graph& other);

  // Not part of GE's interface: the serialized ModelDef.
  const std::string& Model() const;

 private:
  std::shared_ptr<GraphImpl> impl_;
};

class CompiledGraphSummary {
 public:
  class SummaryData;
  // GE keeps the constructor private and offers no way in; only this library makes summaries.
  explicit CompiledGraphSummary(std::shared_ptr<SummaryData> data) : data_(std::move(data)) {}
  CompiledGraphSummary(const CompiledGraphSummary&) = delete;
  CompiledGraphSummary& operator=(const CompiledGraphSummary&) & = delete;
  ~CompiledGraphSummary();
  bool IsStatic() const;
  Status GetConstMemorySize(size_t& size) const;
  Status GetFeatureMemorySize(size_t& size) const;
  Status GetFixedFeatureMemorySize(size_t& size) const;
  Status GetFeatureMemoryBaseRefreshable(bool& refreshable) const;
  Status GetOutputShapes(std::vector<Shape>& shapes) const;
  Status GetOutputDtypes(std::vector<DataType>& dtypes) const;

 private:
  std::shared_ptr<SummaryData> data_;
};

// The caller's allocator of device memory; never used here.
class Allocator;

class Session {
 public:
  explicit Session(const Options& options);
  ~Session();
  Status AddGraph(uint32_t id, const Graph& graph, const Options& options);
  Status CompileGraph(uint32_t id);
  std::shared_ptr<CompiledGraphSummary> GetCompiledGraphSummary(uint32_t id);
  Status RemoveGraph(uint32_t id);
  Status RunGraph(uint32_t id, const std::vector<Tensor>& inputs, std::vector<Tensor>& outputs);
  Status RunGraphWithStreamAsync(uint32_t id, void* stream, const std::vector<Tensor>& inputs,
                                 std::vector<Tensor>& outputs);
  Status SetGraphConstMemoryBase(uint32_t id, const void* const memory, size_t size);
  Status SetGraphFixedFeatureMemoryBase(uint32_t id, const void* const memory, size_t size);
  Status UpdateGraphFeatureMemoryBase(uint32_t id, const void* const memory, size_t size);
  Status UpdateGraphRefreshableFeatureMemoryBase(uint32_t id, const void* const memory,
                                                 size_t size);
  Status RegisterExternalAllocator(const void* const stream,
                                   std::shared_ptr<Allocator> allocator) const;

 private:
  uint64_t sessionId_;
};

Status GEInitialize(const Options& options);
Status GEFinalize();
AscendString GEGetWarningMsgV2();

}  // namespace ge
