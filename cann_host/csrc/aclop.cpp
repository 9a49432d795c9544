// libacl_op_compiler: the descriptors of the single-operator interface, and the function that runs an
// operator. It has Identity, with which torch_npu casts formats if it does not use aclnn (Atlas
// inference products), and refuses every other operator by name. Attributes are accepted and dropped:
// Identity has none.
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "core.h"

using cann_host::Fail;
using cann_host::HandlesOf;
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

constexpr int kMostDims = 64;  // torch's own limit
constexpr int kFormatNd = 2;
constexpr int kFormatNz = 29;
constexpr int64_t kNzRows = 16;

int NoHandle(const char* symbol, const void* handle) {
  return Fail(kInvalidParam, "%s: cann_host did not create %p", symbol, handle);
}

int64_t Count(const std::vector<int64_t>& dims) {
  int64_t count = 1;
  for (const int64_t dim : dims) {
    if (dim < 0 || __builtin_mul_overflow(count, dim, &count)) return -1;
  }
  return count;
}

// The number of parts of a size that hold a count, which is not negative.
int64_t Parts(int64_t count, int64_t size) { return count / size + (count % size != 0); }

bool Holds(const aclDataBuffer& buffer, int64_t count, int64_t width) {
  int64_t bytes = 0;
  return buffer.data != nullptr && count >= 0 && !__builtin_mul_overflow(count, width, &bytes) &&
         static_cast<uint64_t>(bytes) <= buffer.size && cann_host::IsAllocated(buffer.data, bytes);
}

// FRACTAL_NZ (..., C/c0, R/16, 16, c0) of an ND (..., R, C), both ways.
int CastFormat(const aclTensorDesc& nd, const aclTensorDesc& nz, char* nd_data, char* nz_data,
               bool to_nz, int64_t width) {
  const size_t rank = nd.dims.size();
  if (rank < 2 || nz.storage.size() != rank + 2) {
    return Fail(kInvalidParam,
                "Identity: a FRACTAL_NZ tensor has 2 dims or more, and 2 more stored");
  }
  const int64_t rows = nd.dims[rank - 2], cols = nd.dims[rank - 1];
  if (cols < 0 || rows < 0 || Count(nd.dims) < 0) {
    return Fail(kInvalidParam, "Identity: the shape is not valid");
  }
  const int64_t c1 = nz.storage[rank - 2], r1 = nz.storage[rank - 1], c0 = nz.storage[rank + 1];
  const int64_t batch = rows && cols ? Count(nd.dims) / rows / cols : 0;
  if (nz.storage[rank] != kNzRows || c0 < 1 || c1 != Parts(cols, c0) ||
      r1 != Parts(rows, kNzRows) || Count(nz.storage) != batch * c1 * r1 * kNzRows * c0) {
    return Fail(kInvalidParam,
                "Identity: the stored shape is not FRACTAL_NZ of the tensor's shape");
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
  const int64_t width = cann_host::DtypeBytes(in.dtype);
  if (width == 0 || in.dtype != out.dtype || in.dims != out.dims) {
    return Fail(kInvalidParam, "Identity: dtypes %d and %d, or the shapes, are not supported",
                in.dtype, out.dtype);
  }
  // what is read of an ND tensor is its shape
  const auto& read = in.storage_format == kFormatNd ? in.dims : in.storage;
  const auto& written = out.storage_format == kFormatNd ? out.dims : out.storage;
  if (!Holds(from, Count(read), width) || !Holds(to, Count(written), width)) {
    return Fail(kInvalidParam, "Identity: a buffer is smaller than its tensor");
  }
  char* source = static_cast<char*>(from.data);
  char* target = static_cast<char*>(to.data);
  const bool from_nz = in.storage_format == kFormatNz, to_nz = out.storage_format == kFormatNz;
  if (from_nz != to_nz && (from_nz ? out : in).storage_format == kFormatNd) {
    const int64_t read_bytes = Count(read) * width, written_bytes = Count(written) * width;
    if (source < target + written_bytes && target < source + read_bytes) {
      return Fail(kInvalidParam, "Identity: the two tensors of a cast share memory");
    }
    const int code = to_nz ? CastFormat(in, out, source, target, true, width)
                           : CastFormat(out, in, target, source, false, width);
    cann_host::NoteWrite(target, written_bytes);
    return code;
  }
  if (in.storage_format == out.storage_format && read == written) {
    std::memmove(target, source, Count(read) * width);
    cann_host::NoteWrite(target, Count(read) * width);
    return kSuccess;
  }
  return Fail(
      kFeatureUnsupported,
      "cann_host: Identity casts between ND and FRACTAL_NZ only, and formats %d and %d were "
      "asked for",
      in.storage_format, out.storage_format);
}

int Execute(const char* op_type, int num_inputs, const aclTensorDesc* const* inputs,
            const aclDataBuffer* const* sources, int num_outputs,
            const aclTensorDesc* const* outputs, aclDataBuffer* const* targets, void* stream) {
  if (op_type == nullptr) return Fail(kInvalidParam, "aclopCompileAndExecute: no operator's name");
  if (op_type == std::string("Identity") && num_inputs == 1 && num_outputs == 1) {
    if (!inputs || !sources || !outputs || !targets) {
      return Fail(kInvalidParam, "aclopCompileAndExecute: Identity without its tensors");
    }
    for (const aclTensorDesc* desc : {inputs[0], outputs[0]}) {
      if (!HandlesOf<aclTensorDesc>().Has(desc)) return NoHandle("aclopCompileAndExecute", desc);
    }
    for (const aclDataBuffer* buffer :
         {sources[0], static_cast<const aclDataBuffer*>(targets[0])}) {
      if (!HandlesOf<aclDataBuffer>().Has(buffer))
        return NoHandle("aclopCompileAndExecute", buffer);
    }
    // The caller destroys what it passes as soon as the call returns.
    const auto reaches = {cann_host::ReachOf(sources[0]->data, sources[0]->size),
                          cann_host::ReachOf(targets[0]->data, targets[0]->size)};
    return cann_host::OnStream(
        "aclopCompileAndExecute", stream,
        [in = *inputs[0], from = *sources[0], out = *outputs[0], to = *targets[0],
         reaches = std::vector<cann_host::Reach>(reaches)] {
          for (const auto& reach : reaches) {
            if (cann_host::IsThere(reach)) continue;
            return Fail(kInvalidParam, "Identity: %zu bytes at %p are no longer allocated",
                        reach.bytes, reach.data);
          }
          return Identity(in, from, out, to);
        });
  }
  return Fail(
      kFeatureUnsupported,
      "cann_host: operator %s was called through aclopCompileAndExecute, which this stand-in "
      "for CANN does not implement",
      op_type);
}

}  // namespace

extern "C" {

#define GROUP "Single operators (aclop)"

CANN_HOST_ENTRY(aclCreateTensorDesc, "makes")
aclTensorDesc* aclCreateTensorDesc(int dtype, int rank, const int64_t* dims, int format) {
  if (rank < 0 || rank > kMostDims || (rank && !dims)) {
    Fail(kInvalidParam, "aclCreateTensorDesc: %d dims, or a null list of them", rank);
    return nullptr;
  }
  const std::vector<int64_t> sizes(dims, dims + rank);
  return HandlesOf<aclTensorDesc>().Give({dtype, format, sizes, "", format, sizes});
}

CANN_HOST_ENTRY(aclDestroyTensorDesc, "makes")
void aclDestroyTensorDesc(const aclTensorDesc* desc) {
  if (desc != nullptr && !HandlesOf<aclTensorDesc>().Take(desc)) {
    NoHandle("aclDestroyTensorDesc", desc);
  }
}
CANN_HOST_ENTRY(aclGetTensorDescType, "makes")
int aclGetTensorDescType(const aclTensorDesc* desc) {
  if (HandlesOf<aclTensorDesc>().Has(desc)) return desc->dtype;
  NoHandle("aclGetTensorDescType", desc);
  return -1;  // ACL_DT_UNDEFINED
}
CANN_HOST_ENTRY(aclGetTensorDescFormat, "makes")
int aclGetTensorDescFormat(const aclTensorDesc* desc) {
  if (HandlesOf<aclTensorDesc>().Has(desc)) return desc->format;
  NoHandle("aclGetTensorDescFormat", desc);
  return -1;  // ACL_FORMAT_UNDEFINED
}
CANN_HOST_ENTRY(aclGetTensorDescNumDims, "makes")
size_t aclGetTensorDescNumDims(const aclTensorDesc* desc) {
  if (HandlesOf<aclTensorDesc>().Has(desc)) return desc->dims.size();
  NoHandle("aclGetTensorDescNumDims", desc);
  return 0;
}

int aclGetTensorDescDimV2(const aclTensorDesc* desc, size_t index, int64_t* size) {
  CANN_HOST_CALL(aclGetTensorDescDimV2);
  if (!HandlesOf<aclTensorDesc>().Has(desc)) return NoHandle("aclGetTensorDescDimV2", desc);
  if (size == nullptr || index >= desc->dims.size()) {
    return Fail(kInvalidParam, "aclGetTensorDescDimV2: dimension %zu of %zu", index,
                desc->dims.size());
  }
  *size = desc->dims[index];
  return kSuccess;
}

CANN_HOST_ENTRY(aclSetTensorDescName, "makes")
void aclSetTensorDescName(aclTensorDesc* desc, const char* name) {
  if (!HandlesOf<aclTensorDesc>().Has(desc)) {
    NoHandle("aclSetTensorDescName", desc);
  } else {
    desc->name = name == nullptr ? "" : name;
  }
}

int aclSetTensorFormat(aclTensorDesc* desc, int format) {
  CANN_HOST_CALL(aclSetTensorFormat);
  if (!HandlesOf<aclTensorDesc>().Has(desc)) return NoHandle("aclSetTensorFormat", desc);
  desc->storage_format = format;
  return kSuccess;
}

int aclSetTensorShape(aclTensorDesc* desc, int rank, const int64_t* dims) {
  CANN_HOST_CALL(aclSetTensorShape);
  if (!HandlesOf<aclTensorDesc>().Has(desc)) return NoHandle("aclSetTensorShape", desc);
  if (rank < 0 || rank > kMostDims || (rank && !dims)) {
    return Fail(kInvalidParam, "aclSetTensorShape: %d dims, or a null list of them", rank);
  }
  desc->storage.assign(dims, dims + rank);
  return kSuccess;
}

int aclSetTensorPlaceMent(aclTensorDesc*, int) {
  CANN_HOST_CALL(aclSetTensorPlaceMent);
  return kSuccess;
}

CANN_HOST_ENTRY(aclCreateDataBuffer, "makes")
aclDataBuffer* aclCreateDataBuffer(void* data, size_t size) {
  return HandlesOf<aclDataBuffer>().Give({data, size});
}

int aclDestroyDataBuffer(const aclDataBuffer* buffer) {
  CANN_HOST_CALL(aclDestroyDataBuffer);
  if (buffer == nullptr || HandlesOf<aclDataBuffer>().Take(buffer)) return kSuccess;
  return NoHandle("aclDestroyDataBuffer", buffer);
}

CANN_HOST_ENTRY(aclopCreateAttr, "makes")
aclopAttr* aclopCreateAttr() { return HandlesOf<aclopAttr>().Give({}); }
CANN_HOST_ENTRY(aclopDestroyAttr, "makes")
void aclopDestroyAttr(const aclopAttr* attr) {
  if (attr != nullptr && !HandlesOf<aclopAttr>().Take(attr)) NoHandle("aclopDestroyAttr", attr);
}
int aclopSetAttrBool(aclopAttr*, const char*, uint8_t) {
  CANN_HOST_CALL(aclopSetAttrBool);
  return kSuccess;
}
int aclopSetAttrInt(aclopAttr*, const char*, int64_t) {
  CANN_HOST_CALL(aclopSetAttrInt);
  return kSuccess;
}
int aclopSetAttrFloat(aclopAttr*, const char*, float) {
  CANN_HOST_CALL(aclopSetAttrFloat);
  return kSuccess;
}
int aclopSetAttrString(aclopAttr*, const char*, const char*) {
  CANN_HOST_CALL(aclopSetAttrString);
  return kSuccess;
}
int aclopSetAttrDataType(aclopAttr*, const char*, int) {
  CANN_HOST_CALL(aclopSetAttrDataType);
  return kSuccess;
}
int aclopSetAttrListBool(aclopAttr*, const char*, int, const uint8_t*) {
  CANN_HOST_CALL(aclopSetAttrListBool);
  return kSuccess;
}
int aclopSetAttrListInt(aclopAttr*, const char*, int, const int64_t*) {
  CANN_HOST_CALL(aclopSetAttrListInt);
  return kSuccess;
}
int aclopSetAttrListFloat(aclopAttr*, const char*, int, const float*) {
  CANN_HOST_CALL(aclopSetAttrListFloat);
  return kSuccess;
}
int aclopSetAttrListListInt(aclopAttr*, const char*, int, const int*, const int64_t* const*) {
  CANN_HOST_CALL(aclopSetAttrListListInt);
  return kSuccess;
}

int aclopCompileAndExecute(const char* op_type, int num_inputs, const aclTensorDesc* const* inputs,
                           const aclDataBuffer* const* sources, int num_outputs,
                           const aclTensorDesc* const* outputs, aclDataBuffer* const* targets,
                           const aclopAttr*, int, int, const char*, void* stream) {
  CANN_HOST_CALL(aclopCompileAndExecute);
  return cann_host::ReportLaunch(
      Execute(op_type, num_inputs, inputs, sources, num_outputs, outputs, targets, stream));
}

}  // extern "C"
