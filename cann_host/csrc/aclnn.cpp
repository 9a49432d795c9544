// libopapi: descriptors and the two-phase operator calls. ...GetWorkspaceSize validates and copies
// the descriptors, because torch_npu destroys its own before the launch runs on another thread; the
// launch computes and frees the copy. Both phases end in one Python function (aclnn.py).
//
// A call crosses to Python as a flat list of 64-bit words, one group an argument:
//   absent tensor  0
//   tensor         1, address, dtype, format, offset, rank, dims..., strides...,
//                  storage rank, storage dims...
//   number         2, value
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "core.h"

using cann_host::Fail;
using cann_host::kSuccess;

struct aclTensor {
  std::vector<int64_t> dims;
  std::vector<int64_t> strides;
  std::vector<int64_t> storage;
  int dtype;
  int format;
  int64_t offset;
  void* data;
};

struct aclOpExecutor {
  const char* op;
  std::vector<int64_t> words;
};

namespace {

constexpr int kNullPointer = 161001;  // ACLNN_ERR_PARAM_NULLPTR
constexpr int kInvalid = 161002;      // ACLNN_ERR_PARAM_INVALID
constexpr int kInternal = 561000;     // ACLNN_ERR_INNER

constexpr int kFormatNd = 2;
constexpr int kFormatNz = 29;
constexpr int64_t kNzRows = 16;
constexpr int64_t kNzBytes = 32;

enum Phase : int { kCheck = 0, kRun = 1 };
using Run = int (*)(const char* op, int phase, const int64_t* words, int64_t count);
std::atomic<Run> run_in_python{nullptr};

int Call(const char* op, Phase phase, const std::vector<int64_t>& words) {
  const Run run = run_in_python.load();
  if (run == nullptr) {
    return Fail(kInternal, "cann_host: %s was called, but cann_host is not active in this process",
                op);
  }
  return run(op, phase, words.data(), static_cast<int64_t>(words.size()));
}

void Pack(std::vector<int64_t>& words, const aclTensor* tensor) {
  if (tensor == nullptr) {
    words.push_back(0);
    return;
  }
  words.insert(words.end(), {1, reinterpret_cast<int64_t>(tensor->data), tensor->dtype,
                             tensor->format, tensor->offset,
                             static_cast<int64_t>(tensor->dims.size())});
  words.insert(words.end(), tensor->dims.begin(), tensor->dims.end());
  words.insert(words.end(), tensor->strides.begin(), tensor->strides.end());
  words.push_back(static_cast<int64_t>(tensor->storage.size()));
  words.insert(words.end(), tensor->storage.begin(), tensor->storage.end());
}

void Pack(std::vector<int64_t>& words, int64_t number) {
  words.insert(words.end(), {2, number});
}

template <typename... Arguments>
int Prepare(const char* op, uint64_t* workspace_size, aclOpExecutor** executor,
            Arguments... arguments) {
  if (workspace_size == nullptr || executor == nullptr) {
    return Fail(kNullPointer, "%s: no place for the workspace size or the executor", op);
  }
  std::vector<int64_t> words;
  words.reserve(160);
  (Pack(words, arguments), ...);
  if (const int code = Call(op, kCheck, words)) return code;
  *workspace_size = 0;
  *executor = new aclOpExecutor{op, std::move(words)};
  return kSuccess;
}

int Launch(aclOpExecutor* executor, void* stream) {
  if (executor == nullptr) return Fail(kNullPointer, "an operator was launched without executor");
  const std::unique_ptr<aclOpExecutor> owned(executor);
  return cann_host::RunOrCapture(stream, [op = owned->op, words = std::move(owned->words)] {
    return Call(op, kRun, words);
  });
}

// Bytes of one element of the dtypes FRACTAL_NZ is made for; 0 for others.
int64_t ElementBytes(int dtype) {
  switch (dtype) {
    case 2:  // int8
    case 4:  // uint8
      return 1;
    case 1:   // float16
    case 6:   // int16
    case 7:   // uint16
    case 27:  // bfloat16
      return 2;
    case 0:  // float32
    case 3:  // int32
    case 8:  // uint32
      return 4;
    default:
      return 0;
  }
}

}  // namespace

// The Python side; null when the interpreter is about to end.
extern "C" void cann_host_set_aclnn_executor(Run run) { run_in_python = run; }

#define CANN_HOST_LAUNCH(op)                                                              \
  extern "C" int op(void*, uint64_t, aclOpExecutor* executor, void* stream) {             \
    return Launch(executor, stream);                                                      \
  }

extern "C" {

// ---- descriptors ----

aclTensor* aclCreateTensor(const int64_t* dims, uint64_t rank, int dtype, const int64_t* strides,
                           int64_t offset, int format, const int64_t* storage,
                           uint64_t storage_rank, void* data) {
  return new aclTensor{{dims, dims + rank},
                       {strides, strides + rank},
                       {storage, storage + storage_rank},
                       dtype,
                       format,
                       offset,
                       data};
}

int aclDestroyTensor(const aclTensor* tensor) {
  delete tensor;
  return kSuccess;
}

// ---- quantized matmul ----

int aclnnTransQuantParamV3GetWorkspaceSize(const aclTensor* scale, const aclTensor* offset,
                                           int64_t round_mode, const aclTensor* out,
                                           uint64_t* workspace_size, aclOpExecutor** executor) {
  return Prepare("aclnnTransQuantParamV3", workspace_size, executor, scale, offset, round_mode,
                 out);
}

int aclnnTransQuantParamV2GetWorkspaceSize(const aclTensor* scale, const aclTensor* offset,
                                           const aclTensor* out, uint64_t* workspace_size,
                                           aclOpExecutor** executor) {
  return Prepare("aclnnTransQuantParamV2", workspace_size, executor, scale, offset, int64_t{0},
                 out);
}

int aclnnQuantMatmulV5GetWorkspaceSize(const aclTensor* x1, const aclTensor* x2,
                                       const aclTensor* x1_scale, const aclTensor* x2_scale,
                                       const aclTensor* y_scale, const aclTensor* x1_offset,
                                       const aclTensor* x2_offset, const aclTensor* y_offset,
                                       const aclTensor* bias, bool transpose_x1, bool transpose_x2,
                                       int64_t group_size, const aclTensor* out,
                                       uint64_t* workspace_size, aclOpExecutor** executor) {
  return Prepare("aclnnQuantMatmulV5", workspace_size, executor, x1, x2, x1_scale, x2_scale,
                 y_scale, x1_offset, x2_offset, y_offset, bias, int64_t{transpose_x1},
                 int64_t{transpose_x2}, group_size, out);
}

int aclnnQuantMatmulWeightNzGetWorkspaceSize(
    const aclTensor* x1, const aclTensor* x2, const aclTensor* x1_scale, const aclTensor* x2_scale,
    const aclTensor* y_scale, const aclTensor* x1_offset, const aclTensor* x2_offset,
    const aclTensor* y_offset, const aclTensor* bias, bool transpose_x1, bool transpose_x2,
    int64_t group_size, const aclTensor* out, uint64_t* workspace_size, aclOpExecutor** executor) {
  return Prepare("aclnnQuantMatmulWeightNz", workspace_size, executor, x1, x2, x1_scale, x2_scale,
                 y_scale, x1_offset, x2_offset, y_offset, bias, int64_t{transpose_x1},
                 int64_t{transpose_x2}, group_size, out);
}

// ---- quantized activations ----

int aclnnDynamicQuantV2GetWorkspaceSize(const aclTensor* x, const aclTensor* smooth_scales,
                                        const aclTensor* group_index, int64_t dst_type,
                                        const aclTensor* y, const aclTensor* scale,
                                        const aclTensor* offset, uint64_t* workspace_size,
                                        aclOpExecutor** executor) {
  return Prepare("aclnnDynamicQuantV2", workspace_size, executor, x, smooth_scales, group_index,
                 dst_type, y, scale, offset);
}

// round_mode crosses to Python as whether it is "round", the only one there is here.
int aclnnAscendQuantV3GetWorkspaceSize(const aclTensor* x, const aclTensor* scale,
                                       const aclTensor* offset, bool sqrt_mode,
                                       const char* round_mode, int32_t dst_type, int32_t axis,
                                       const aclTensor* y, uint64_t* workspace_size,
                                       aclOpExecutor** executor) {
  const bool rounds = round_mode != nullptr && std::strcmp(round_mode, "round") == 0;
  return Prepare("aclnnAscendQuantV3", workspace_size, executor, x, scale, offset,
                 int64_t{sqrt_mode}, int64_t{rounds}, int64_t{dst_type}, int64_t{axis}, y);
}

// ---- copies, casts, formats ----

int aclnnInplaceCopyGetWorkspaceSize(const aclTensor* self, const aclTensor* source,
                                     uint64_t* workspace_size, aclOpExecutor** executor) {
  return Prepare("aclnnInplaceCopy", workspace_size, executor, self, source);
}

int aclnnCastGetWorkspaceSize(const aclTensor* self, int dtype, const aclTensor* out,
                              uint64_t* workspace_size, aclOpExecutor** executor) {
  return Prepare("aclnnCast", workspace_size, executor, self, int64_t{dtype}, out);
}

int aclnnInplaceZeroGetWorkspaceSize(const aclTensor* self, uint64_t* workspace_size,
                                     aclOpExecutor** executor) {
  return Prepare("aclnnInplaceZero", workspace_size, executor, self);
}

int aclnnNpuFormatCastGetWorkspaceSize(const aclTensor* source, const aclTensor* out,
                                       uint64_t* workspace_size, aclOpExecutor** executor) {
  return Prepare("aclnnNpuFormatCast", workspace_size, executor, source, out);
}

// The storage of a cast's result. The caller frees the dims with delete[]. additional_dtype is the
// type whose width decides C0, the columns of one block.
int aclnnNpuFormatCastCalculateSizeAndFormat(const aclTensor* source, int format,
                                             int additional_dtype, int64_t** dims, uint64_t* rank,
                                             int* actual_format) {
  if (source == nullptr || dims == nullptr || rank == nullptr || actual_format == nullptr) {
    return Fail(kNullPointer, "aclnnNpuFormatCastCalculateSizeAndFormat: an argument is null");
  }
  std::vector<int64_t> out = source->dims;
  if (format == kFormatNz) {
    const int64_t width = ElementBytes(additional_dtype);
    if (out.size() < 2 || width == 0) {
      return Fail(kInvalid,
                  "aclnnNpuFormatCast: no FRACTAL_NZ for %zu dims and dtype %d (CANN error %d)",
                  out.size(), additional_dtype, kInvalid);
    }
    const int64_t c0 = kNzBytes / width;
    const int64_t columns = out.back();
    const int64_t rows = out[out.size() - 2];
    out[out.size() - 2] = (columns + c0 - 1) / c0;
    out.back() = (rows + kNzRows - 1) / kNzRows;
    out.insert(out.end(), {kNzRows, c0});
  } else if (format != kFormatNd) {
    return Fail(kInvalid, "aclnnNpuFormatCast: cann_host knows ND and FRACTAL_NZ, not format %d",
                format);
  }
  *dims = new int64_t[out.size()];
  std::copy(out.begin(), out.end(), *dims);
  *rank = out.size();
  *actual_format = format;
  return kSuccess;
}

}  // extern "C"

CANN_HOST_LAUNCH(aclnnTransQuantParamV3)
CANN_HOST_LAUNCH(aclnnTransQuantParamV2)
CANN_HOST_LAUNCH(aclnnQuantMatmulV5)
CANN_HOST_LAUNCH(aclnnQuantMatmulWeightNz)
CANN_HOST_LAUNCH(aclnnDynamicQuantV2)
CANN_HOST_LAUNCH(aclnnAscendQuantV3)
CANN_HOST_LAUNCH(aclnnInplaceCopy)
CANN_HOST_LAUNCH(aclnnCast)
CANN_HOST_LAUNCH(aclnnInplaceZero)
CANN_HOST_LAUNCH(aclnnNpuFormatCast)
