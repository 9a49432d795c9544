// What the two files of the graph engine share: graph.cpp (libgraph) and ge.cpp (libge_runner).
#pragma once

#include "core.h"
#include "ge_abi.h"

namespace ge {

// GE reports success and failure; torchair does not interpret the code of a failure.
constexpr Status kFailed = GRAPH_FAILED;

template <typename... Args>
Status Failed(const char* fmt, Args... args) {
  cann_host::Fail(cann_host::kFailure, fmt, args...);
  return kFailed;
}

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

}  // namespace ge
