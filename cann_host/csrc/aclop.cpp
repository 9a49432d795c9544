// libacl_op_compiler: the descriptors of the single-operator interface, and its one verb. It knows
// Identity, by which torch_npu casts formats where it does not use aclnn (Atlas inference products),
// and refuses every other operator by name. Attributes are accepted and dropped: Identity has none.
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "core.h"

using cann_host::Fail;
using cann_host::kFeatureUnsupported;
using cann_host::kInvalidParam;
using cann_host::kSuccess;

// dims and format are the origin's; torch_npu sets the storage's afterwards.
struct aclTensorDesc {
  int dtype;
  int format;
  std::vector<int64_t> dims;
  std::string name;
  int storage_format;
  std::vector<int64_t> storage;
};

struct aclDataBuffer {
  void* data;
  size_t size;
};

struct aclopAttr {};

namespace {

constexpr int kFormatNd = 2;
constexpr int kFormatNz = 29;
constexpr int64_t kNzRows = 16;

// Bytes of an element, 0 for a dtype Identity does not move here.
int64_t Width(int dtype) {
  switch (dtype) {
    case 2:   // int8
    case 4:   // uint8
    case 12:  // bool
      return 1;
    case 1:   // float16
    case 6:   // int16
    case 27:  // bfloat16
      return 2;
    case 0:  // float32
    case 3:  // int32
      return 4;
    case 9:  // int64
      return 8;
    default:
      return 0;
  }
}

int64_t Count(const std::vector<int64_t>& dims) {
  int64_t count = 1;
  for (const int64_t dim : dims) {
    if (dim < 0 || __builtin_mul_overflow(count, dim, &count)) return -1;
  }
  return count;
}

bool Holds(const aclDataBuffer& buffer, int64_t count, int64_t width) {
  int64_t bytes = 0;
  return buffer.data != nullptr && count >= 0 && !__builtin_mul_overflow(count, width, &bytes) &&
         static_cast<uint64_t>(bytes) <= buffer.size;
}

// FRACTAL_NZ (..., C/c0, R/16, 16, c0) of an ND (..., R, C), both ways.
int CastFormat(const aclTensorDesc& nd, const aclTensorDesc& nz, char* nd_data, char* nz_data,
               bool to_nz, int64_t width) {
  const size_t rank = nd.dims.size();
  if (rank < 2 || nz.storage.size() != rank + 2) {
    return Fail(kInvalidParam, "Identity: a FRACTAL_NZ tensor has 2 dims or more, and 2 more stored");
  }
  const int64_t rows = nd.dims[rank - 2], cols = nd.dims[rank - 1];
  const int64_t c1 = nz.storage[rank - 2], r1 = nz.storage[rank - 1], c0 = nz.storage[rank + 1];
  const int64_t batch = rows && cols ? Count(nd.dims) / rows / cols : 0;
  if (nz.storage[rank] != kNzRows || c0 < 1 || c1 != (cols + c0 - 1) / c0 ||
      r1 != (rows + kNzRows - 1) / kNzRows ||
      Count(nz.storage) != batch * c1 * r1 * kNzRows * c0) {
    return Fail(kInvalidParam, "Identity: the stored shape is not FRACTAL_NZ of the tensor's shape");
  }
  if (to_nz) std::memset(nz_data, 0, Count(nz.storage) * width);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t block = 0; block < c1; ++block) {
      const int64_t from = block * c0;
      const int64_t bytes = (cols - from < c0 ? cols - from : c0) * width;
      for (int64_t row = 0; row < rows; ++row) {
        char* flat = nd_data + ((b * rows + row) * cols + from) * width;
        char* tile = nz_data + ((b * c1 + block) * r1 * kNzRows + row) * c0 * width;
        std::memcpy(to_nz ? tile : flat, to_nz ? flat : tile, bytes);
      }
    }
  }
  return kSuccess;
}

// Moves a tensor into another storage format.
int Identity(const aclTensorDesc& in, const aclDataBuffer& from, const aclTensorDesc& out,
             const aclDataBuffer& to) {
  const int64_t width = Width(in.dtype);
  if (width == 0 || in.dtype != out.dtype || in.dims != out.dims) {
    return Fail(kInvalidParam, "Identity: dtypes %d and %d, or the shapes, are not supported",
                in.dtype, out.dtype);
  }
  if (!Holds(from, Count(in.storage), width) || !Holds(to, Count(out.storage), width)) {
    return Fail(kInvalidParam, "Identity: a buffer is smaller than its tensor");
  }
  char* source = static_cast<char*>(from.data);
  char* target = static_cast<char*>(to.data);
  const bool from_nz = in.storage_format == kFormatNz, to_nz = out.storage_format == kFormatNz;
  if (from_nz != to_nz && (from_nz ? out : in).storage_format == kFormatNd) {
    return to_nz ? CastFormat(in, out, source, target, true, width)
                 : CastFormat(out, in, target, source, false, width);
  }
  if (in.storage_format == out.storage_format && in.storage == out.storage) {
    std::memmove(target, source, Count(in.storage) * width);
    return kSuccess;
  }
  return Fail(kFeatureUnsupported,
              "cann_host: Identity casts between ND and FRACTAL_NZ only, and formats %d and %d were "
              "asked for",
              in.storage_format, out.storage_format);
}

}  // namespace

extern "C" {

aclTensorDesc* aclCreateTensorDesc(int dtype, int rank, const int64_t* dims, int format) {
  const std::vector<int64_t> sizes(dims, dims + rank);
  return new aclTensorDesc{dtype, format, sizes, "", format, sizes};
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
  desc->storage_format = format;
  return kSuccess;
}

int aclSetTensorShape(aclTensorDesc* desc, int rank, const int64_t* dims) {
  desc->storage.assign(dims, dims + rank);
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

int aclopCompileAndExecute(const char* op_type, int num_inputs, const aclTensorDesc* const* inputs,
                           const aclDataBuffer* const* sources, int num_outputs,
                           const aclTensorDesc* const* outputs, aclDataBuffer* const* targets,
                           const aclopAttr*, int, int, const char*, void*) {
  if (op_type == std::string("Identity") && num_inputs == 1 && num_outputs == 1) {
    return Identity(*inputs[0], *sources[0], *outputs[0], *targets[0]);
  }
  return Fail(kFeatureUnsupported,
              "cann_host: operator %s was called through aclopCompileAndExecute, which this stand-in "
              "for CANN does not implement",
              op_type);
}

}  // extern "C"
