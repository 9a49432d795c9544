// libacl_op_compiler: the descriptors of the single-operator interface, and its one verb, which
// refuses by the operator's name. Attributes are accepted and dropped: nothing would read them.
#include <cstdint>
#include <string>
#include <vector>

#include "core.h"

using cann_host::Fail;
using cann_host::kFeatureUnsupported;
using cann_host::kInvalidParam;
using cann_host::kSuccess;

struct aclTensorDesc {
  int dtype;
  int format;
  std::vector<int64_t> dims;
  std::string name;
};

struct aclDataBuffer {
  void* data;
  size_t size;
};

struct aclopAttr {};

extern "C" {

aclTensorDesc* aclCreateTensorDesc(int dtype, int rank, const int64_t* dims, int format) {
  return new aclTensorDesc{dtype, format, std::vector<int64_t>(dims, dims + rank), ""};
}

void aclDestroyTensorDesc(const aclTensorDesc* desc) { delete desc; }
int aclGetTensorDescType(const aclTensorDesc* desc) { return desc->dtype; }
int aclGetTensorDescFormat(const aclTensorDesc* desc) { return desc->format; }
size_t aclGetTensorDescNumDims(const aclTensorDesc* desc) { return desc->dims.size(); }

int aclGetTensorDescDimV2(const aclTensorDesc* desc, size_t index, int64_t* size) {
  if (index >= desc->dims.size()) {
    return Fail(kInvalidParam, "aclGetTensorDescDimV2: dimension %zu of %zu", index,
                desc->dims.size());
  }
  *size = desc->dims[index];
  return kSuccess;
}

void aclSetTensorDescName(aclTensorDesc* desc, const char* name) { desc->name = name; }

int aclSetTensorFormat(aclTensorDesc* desc, int format) {
  desc->format = format;
  return kSuccess;
}

int aclSetTensorShape(aclTensorDesc* desc, int rank, const int64_t* dims) {
  desc->dims.assign(dims, dims + rank);
  return kSuccess;
}

int aclSetTensorPlaceMent(aclTensorDesc*, int) { return kSuccess; }

aclDataBuffer* aclCreateDataBuffer(void* data, size_t size) {
  return new aclDataBuffer{data, size};
}

int aclDestroyDataBuffer(const aclDataBuffer* buffer) {
  delete buffer;
  return kSuccess;
}

aclopAttr* aclopCreateAttr() { return new aclopAttr; }
void aclopDestroyAttr(const aclopAttr* attr) { delete attr; }
int aclopSetAttrBool(aclopAttr*, const char*, uint8_t) { return kSuccess; }
int aclopSetAttrInt(aclopAttr*, const char*, int64_t) { return kSuccess; }
int aclopSetAttrFloat(aclopAttr*, const char*, float) { return kSuccess; }
int aclopSetAttrString(aclopAttr*, const char*, const char*) { return kSuccess; }
int aclopSetAttrDataType(aclopAttr*, const char*, int) { return kSuccess; }
int aclopSetAttrListBool(aclopAttr*, const char*, int, const uint8_t*) { return kSuccess; }
int aclopSetAttrListInt(aclopAttr*, const char*, int, const int64_t*) { return kSuccess; }
int aclopSetAttrListFloat(aclopAttr*, const char*, int, const float*) { return kSuccess; }
int aclopSetAttrListListInt(aclopAttr*, const char*, int, const int*, const int64_t* const*) {
  return kSuccess;
}

int aclopCompileAndExecute(const char* op_type, int, const aclTensorDesc* const*,
                           const aclDataBuffer* const*, int, const aclTensorDesc* const*,
                           aclDataBuffer* const*, const aclopAttr*, int, int, const char*, void*) {
  return Fail(kFeatureUnsupported,
              "cann_host: operator %s was called through aclopCompileAndExecute, which this stand-in "
              "for CANN does not implement",
              op_type);
}

}  // extern "C"
