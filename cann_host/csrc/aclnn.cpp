// libopapi: descriptors and the two-phase operator calls. ...GetWorkspaceSize validates and copies
// the descriptors, because torch_npu destroys its own before the launch runs on another thread; the
// launch computes and frees the copy. Both phases end in one Python function (aclnn/runner.py).
//
// A call crosses to Python as a flat list of 64-bit words, one group an argument:
//   absent tensor  0
//   tensor         1, address, dtype, format, offset, rank, dims..., strides...,
//                  storage rank, storage dims...
//   number         2, value
//   real number    3, bits of the double
//   integers       4, how many, values...
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "core.h"
#include "python.h"

using cann_host::Fail;
using cann_host::HandlesOf;
using cann_host::kSuccess;
using cann_host::Reach;

struct aclTensor {
  std::vector<int64_t> dims;
  std::vector<int64_t> strides;
  std::vector<int64_t> storage;
  int dtype;
  int format;
  int64_t offset;
  void* data;
};

struct aclIntArray {
  std::vector<int64_t> values;
};

// A number, whatever its dtype was.
struct aclScalar {
  bool is_real;
  double real;
  int64_t integer;
};

struct aclOpExecutor {
  const char* op;
  std::vector<int64_t> words;
  std::vector<Reach> reaches;
  bool is_checked;  // by Python
  std::function<void()> abandon;  // its arguments
};

namespace {

constexpr int kNullPointer = 161001;  // ACLNN_ERR_PARAM_NULLPTR
constexpr int kInvalid = 161002;      // ACLNN_ERR_PARAM_INVALID
constexpr int kInternal = 561000;     // ACLNN_ERR_INNER

constexpr uint64_t kMostDims = 64;  // torch's own limit; CANN's operators take 8

constexpr int kFormatNd = 2;
constexpr int kFormatNz = 29;
constexpr int64_t kNzRows = 16;
constexpr int64_t kNzBytes = 32;

enum Phase : int { kCheck = 0, kRun = 1 };
cann_host::PythonFunction run_in_python;  // of the operator, the phase, and the words' address and number

int Call(const char* op, Phase phase, const std::vector<int64_t>& words) {
  return run_in_python.Call(op, kInternal, "(siKK)", op, static_cast<int>(phase),
                            static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(words.data())),
                            static_cast<unsigned long long>(words.size()));
}

int NoHandle(const char* op, const void* handle) {
  return Fail(kInvalid, "%s: %p was not made here, or is destroyed (CANN error %d)", op, handle,
              kInvalid);
}

template <typename T>
int Destroy(const char* op, const T* handle) {
  if (handle == nullptr || HandlesOf<T>().Take(handle)) return kSuccess;
  return NoHandle(op, handle);
}

// A tensor must lie in memory that was allocated here: reading past it would be garbage or a crash.
int Check(const char* op, std::vector<Reach>& reaches, const aclTensor* tensor) {
  if (tensor == nullptr) return kSuccess;
  if (!HandlesOf<aclTensor>().Has(tensor)) return NoHandle(op, tensor);
  const int64_t width = cann_host::DtypeBytes(tensor->dtype);
  if (width == 0) {
    return Fail(kInvalid, "%s: cann_host does not know aclDataType %d", op, tensor->dtype);
  }
  // What is read is what decides: the storage of FRACTAL_NZ, the dims of anything else.
  const auto& sizes = tensor->format == kFormatNz ? tensor->storage : tensor->dims;
  const bool is_empty = std::count(sizes.begin(), sizes.end(), 0) != 0;
  bool fits = tensor->offset >= 0 && reinterpret_cast<uintptr_t>(tensor->data) % width == 0;
  int64_t bytes = 1;
  if (tensor->format == kFormatNz) {
    for (const int64_t size : tensor->storage) {
      fits = fits && size >= 0 && !__builtin_mul_overflow(bytes, size, &bytes);
    }
  } else {
    int64_t step = 0;
    fits = fits && !__builtin_add_overflow(bytes, tensor->offset, &bytes);
    for (size_t i = 0; i < tensor->dims.size(); ++i) {
      const int64_t size = tensor->dims[i], stride = tensor->strides[i];
      fits = fits && size >= 0 && stride >= 0 &&
             !__builtin_mul_overflow(size - 1, stride, &step) &&
             !__builtin_add_overflow(bytes, step, &bytes);
    }
  }
  fits = fits && !__builtin_mul_overflow(bytes, width, &bytes);
  if (fits && is_empty) return kSuccess;
  // A stride of 0 makes much of little; what no device could hold would be computed for ever.
  int64_t whole = width;
  for (const int64_t size : tensor->dims) {
    fits = fits && !__builtin_mul_overflow(whole, size, &whole);
  }
  fits = fits && whole <= static_cast<int64_t>(cann_host::DeviceBytes());
  if (fits) {
    reaches.push_back(cann_host::ReachOf(tensor->data, static_cast<size_t>(bytes)));
    if (reaches.back().block != 0) return kSuccess;
  }
  return Fail(kInvalid,
              "%s: a tensor of %zu dims at %p does not lie in memory that was allocated here, or not at "
              "a multiple of its element's bytes (CANN error %d)",
              op, tensor->dims.size(), tensor->data, kInvalid);
}

int Check(const char*, std::vector<Reach>&, int64_t) { return kSuccess; }
int Check(const char*, std::vector<Reach>&, double) { return kSuccess; }

// Lists and scalars, which an operator always has.
template <typename T>
int Check(const char* op, std::vector<Reach>&, const T* argument) {
  if (argument == nullptr) return Fail(kNullPointer, "%s: an argument is null", op);
  return HandlesOf<T>().Has(argument) ? kSuccess : NoHandle(op, argument);
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

void Pack(std::vector<int64_t>& words, double number) {
  int64_t bits = 0;
  std::memcpy(&bits, &number, sizeof(bits));
  words.insert(words.end(), {3, bits});
}

void Pack(std::vector<int64_t>& words, const aclIntArray* array) {
  words.insert(words.end(), {4, static_cast<int64_t>(array->values.size())});
  words.insert(words.end(), array->values.begin(), array->values.end());
}

void Pack(std::vector<int64_t>& words, const aclScalar* scalar) {
  if (scalar->is_real) {
    Pack(words, scalar->real);
  } else {
    Pack(words, scalar->integer);
  }
}

// What gives up on an argument once its call has failed.
std::function<void()> Abandoning(int64_t) { return [] {}; }
std::function<void()> Abandoning(double) { return [] {}; }
template <typename T>
std::function<void()> Abandoning(const T* argument) {
  const uint64_t number = HandlesOf<T>().Number(argument);
  if (number == 0) return [] {};
  return [=] { HandlesOf<T>().Abandon(argument, number); };
}

template <typename... Arguments>
int Prepared(const char* op, uint64_t* workspace_size, aclOpExecutor** executor,
             Arguments... arguments) {
  if (workspace_size == nullptr || executor == nullptr) {
    return Fail(kNullPointer, "%s: no place for the workspace size or the executor", op);
  }
  int code = cann_host::Fault((std::string(op) + "GetWorkspaceSize").c_str());
  std::vector<Reach> reaches;
  ((code = code == kSuccess ? Check(op, reaches, arguments) : code), ...);
  const auto abandon = [all = std::vector<std::function<void()>>{Abandoning(arguments)...}] {
    for (const auto& one : all) one();
  };
  if (code != kSuccess) {
    abandon();
    return code;
  }
  std::vector<int64_t> words;
  words.reserve(160);
  (Pack(words, arguments), ...);
  // Python's check waits for the launch's turn where whoever waits may hold Python's lock: see IsLate.
  const bool checks = cann_host::GetPython() == nullptr || cann_host::IsPythonThread();
  if (checks) code = Call(op, kCheck, words);
  if (code != kSuccess) {
    abandon();
    return code;
  }
  *workspace_size = 0;
  *executor =
      HandlesOf<aclOpExecutor>().Give({op, std::move(words), std::move(reaches), checks, abandon});
  return kSuccess;
}

template <typename... Arguments>
int Prepare(Arguments... arguments) {
  return cann_host::ReportLaunch(Prepared(arguments...));
}

int Launch(const char* op, aclOpExecutor* executor, void* stream) {
  // taken first: a launch that fails, on demand too, has used its executor up
  const std::shared_ptr<const aclOpExecutor> call = HandlesOf<aclOpExecutor>().Take(executor);
  int code = cann_host::Fault(op);
  if (code == kSuccess && (call == nullptr || std::strcmp(call->op, op) != 0)) {
    return Fail(kNullPointer, "%s was launched without an executor of its own", op);
  }
  if (code == kSuccess) {
    code = cann_host::OnStream(op, stream, [call] {
      // it may be much later, and again: a captured graph
      for (const Reach& reach : call->reaches) {
        if (!cann_host::IsThere(reach)) {
          return Fail(kInvalid, "%s: %zu bytes at %p are no longer allocated (CANN error %d)",
                      call->op, reach.bytes, reach.data, kInvalid);
        }
      }
      const int refused = call->is_checked ? kSuccess : Call(call->op, kCheck, call->words);
      return refused ? refused : Call(call->op, kRun, call->words);
    });
  }
  if (code != kSuccess && call != nullptr) call->abandon();
  return code;
}

}  // namespace

// The Python side; null when the interpreter is about to end.
extern "C" void cann_host_set_aclnn_executor(void* run) { run_in_python.Set(run); }

#define GROUP "Operators (aclnn)"

// Begins the first phase of an operator, which ends in Prepare: that lets it fail on demand.
#define CANN_HOST_PREPARES(symbol) CANN_HOST_ENTRY(symbol, "does")

// The second phase of an operator.
#define CANN_HOST_LAUNCH(op)                                                              \
  extern "C" int op(void*, uint64_t, aclOpExecutor* executor, void* stream) {             \
    CANN_HOST_ENTRY(op, "does")                                                           \
    return cann_host::ReportLaunch(Launch(#op, executor, stream));                        \
  }

extern "C" {

CANN_HOST_ENTRY(aclCreateTensor, "makes")
aclTensor* aclCreateTensor(const int64_t* dims, uint64_t rank, int dtype, const int64_t* strides,
                           int64_t offset, int format, const int64_t* storage,
                           uint64_t storage_rank, void* data) {
  if (rank > kMostDims || storage_rank > kMostDims || (rank && !(dims && strides)) ||
      (storage_rank && !storage)) {
    Fail(kInvalid, "aclCreateTensor: %llu dims and %llu stored ones, or a null list of them",
         static_cast<unsigned long long>(rank), static_cast<unsigned long long>(storage_rank));
    return nullptr;
  }
  return HandlesOf<aclTensor>().Give({{dims, dims + rank},
                                      {strides, strides + rank},
                                      {storage, storage + storage_rank},
                                      dtype,
                                      format,
                                      offset,
                                      data});
}

int aclDestroyTensor(const aclTensor* tensor) {
  CANN_HOST_CALL(aclDestroyTensor);
  return Destroy("aclDestroyTensor", tensor);
}

CANN_HOST_ENTRY(aclCreateIntArray, "makes")
aclIntArray* aclCreateIntArray(const int64_t* values, uint64_t size) {
  if (size > kMostDims * 2 || (size && !values)) {
    Fail(kInvalid, "aclCreateIntArray: %llu values, or a null list of them",
         static_cast<unsigned long long>(size));
    return nullptr;
  }
  return HandlesOf<aclIntArray>().Give({{values, values + size}});
}

int aclDestroyIntArray(const aclIntArray* array) {
  CANN_HOST_CALL(aclDestroyIntArray);
  return Destroy("aclDestroyIntArray", array);
}

// torch_npu makes float, double, int64 and bool scalars.
CANN_HOST_ENTRY(aclCreateScalar, "makes")
aclScalar* aclCreateScalar(void* value, int dtype) {
  if (value == nullptr) {
    Fail(kNullPointer, "aclCreateScalar: no value");
    return nullptr;
  }
  switch (dtype) {
    case 0:
      return HandlesOf<aclScalar>().Give({true, *static_cast<float*>(value), 0});
    case 11:
      return HandlesOf<aclScalar>().Give({true, *static_cast<double*>(value), 0});
    case 9:
      return HandlesOf<aclScalar>().Give({false, 0, *static_cast<int64_t*>(value)});
    case 12:
      return HandlesOf<aclScalar>().Give({false, 0, *static_cast<bool*>(value)});
    default:
      Fail(kInvalid, "aclCreateScalar: cann_host does not know a scalar of aclDataType %d", dtype);
      return nullptr;
  }
}

int aclDestroyScalar(const aclScalar* scalar) {
  CANN_HOST_CALL(aclDestroyScalar);
  return Destroy("aclDestroyScalar", scalar);
}

int aclnnTransQuantParamV3GetWorkspaceSize(const aclTensor* scale, const aclTensor* offset,
                                           int64_t round_mode, const aclTensor* out,
                                           uint64_t* workspace_size, aclOpExecutor** executor) {
  CANN_HOST_PREPARES(aclnnTransQuantParamV3GetWorkspaceSize)
  return Prepare("aclnnTransQuantParamV3", workspace_size, executor, scale, offset, round_mode,
                 out);
}

int aclnnTransQuantParamV2GetWorkspaceSize(const aclTensor* scale, const aclTensor* offset,
                                           const aclTensor* out, uint64_t* workspace_size,
                                           aclOpExecutor** executor) {
  CANN_HOST_PREPARES(aclnnTransQuantParamV2GetWorkspaceSize)
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
  CANN_HOST_PREPARES(aclnnQuantMatmulV5GetWorkspaceSize)
  return Prepare("aclnnQuantMatmulV5", workspace_size, executor, x1, x2, x1_scale, x2_scale,
                 y_scale, x1_offset, x2_offset, y_offset, bias, int64_t{transpose_x1},
                 int64_t{transpose_x2}, group_size, out);
}

int aclnnQuantMatmulWeightNzGetWorkspaceSize(
    const aclTensor* x1, const aclTensor* x2, const aclTensor* x1_scale, const aclTensor* x2_scale,
    const aclTensor* y_scale, const aclTensor* x1_offset, const aclTensor* x2_offset,
    const aclTensor* y_offset, const aclTensor* bias, bool transpose_x1, bool transpose_x2,
    int64_t group_size, const aclTensor* out, uint64_t* workspace_size, aclOpExecutor** executor) {
  CANN_HOST_PREPARES(aclnnQuantMatmulWeightNzGetWorkspaceSize)
  return Prepare("aclnnQuantMatmulWeightNz", workspace_size, executor, x1, x2, x1_scale, x2_scale,
                 y_scale, x1_offset, x2_offset, y_offset, bias, int64_t{transpose_x1},
                 int64_t{transpose_x2}, group_size, out);
}

int aclnnDynamicQuantV2GetWorkspaceSize(const aclTensor* x, const aclTensor* smooth_scales,
                                        const aclTensor* group_index, int64_t dst_type,
                                        const aclTensor* y, const aclTensor* scale,
                                        const aclTensor* offset, uint64_t* workspace_size,
                                        aclOpExecutor** executor) {
  CANN_HOST_PREPARES(aclnnDynamicQuantV2GetWorkspaceSize)
  return Prepare("aclnnDynamicQuantV2", workspace_size, executor, x, smooth_scales, group_index,
                 dst_type, y, scale, offset);
}

// A text crosses to Python as its place among those there are, -1 for another one: of quant_mode in
// rules.QUANT_MODES, of round_mode in aclnn.ROUND_MODES.
static int64_t PlaceOf(const char* text, std::initializer_list<const char*> texts) {
  int64_t place = 0;
  for (const char* one : texts) {
    if (text != nullptr && std::strcmp(text, one) == 0) return place;
    ++place;
  }
  return -1;
}

static int64_t QuantMode(const char* text) {
  return PlaceOf(text, {"pertoken", "pertensor", "perchannel"});
}

int aclnnDynamicQuantV3GetWorkspaceSize(const aclTensor* x, const aclTensor* smooth_scales,
                                        const aclTensor* group_index, int64_t dst_type,
                                        bool is_symmetrical, const char* quant_mode,
                                        const aclTensor* y, const aclTensor* scale,
                                        const aclTensor* offset, uint64_t* workspace_size,
                                        aclOpExecutor** executor) {
  CANN_HOST_PREPARES(aclnnDynamicQuantV3GetWorkspaceSize)
  return Prepare("aclnnDynamicQuantV3", workspace_size, executor, x, smooth_scales, group_index,
                 dst_type, int64_t{is_symmetrical}, QuantMode(quant_mode), 0.0, y, scale, offset);
}

int aclnnDynamicQuantV4GetWorkspaceSize(const aclTensor* x, const aclTensor* smooth_scales,
                                        const aclTensor* group_index, int64_t dst_type,
                                        bool is_symmetrical, const char* quant_mode,
                                        float dst_type_max, const aclTensor* y,
                                        const aclTensor* scale, const aclTensor* offset,
                                        uint64_t* workspace_size, aclOpExecutor** executor) {
  CANN_HOST_PREPARES(aclnnDynamicQuantV4GetWorkspaceSize)
  return Prepare("aclnnDynamicQuantV4", workspace_size, executor, x, smooth_scales, group_index,
                 dst_type, int64_t{is_symmetrical}, QuantMode(quant_mode), double{dst_type_max}, y,
                 scale, offset);
}

int aclnnAscendQuantV3GetWorkspaceSize(const aclTensor* x, const aclTensor* scale,
                                       const aclTensor* offset, bool sqrt_mode,
                                       const char* round_mode, int32_t dst_type, int32_t axis,
                                       const aclTensor* y, uint64_t* workspace_size,
                                       aclOpExecutor** executor) {
  CANN_HOST_PREPARES(aclnnAscendQuantV3GetWorkspaceSize)
  const int64_t rounds = PlaceOf(round_mode, {"round", "floor", "ceil", "trunc"});
  return Prepare("aclnnAscendQuantV3", workspace_size, executor, x, scale, offset,
                 int64_t{sqrt_mode}, rounds, int64_t{dst_type}, int64_t{axis}, y);
}

int aclnnQuantizeGetWorkspaceSize(const aclTensor* x, const aclTensor* scales,
                                  const aclTensor* zero_points, int dtype, int32_t axis,
                                  const aclTensor* out, uint64_t* workspace_size,
                                  aclOpExecutor** executor) {
  CANN_HOST_PREPARES(aclnnQuantizeGetWorkspaceSize)
  return Prepare("aclnnQuantize", workspace_size, executor, x, scales, zero_points, int64_t{dtype},
                 int64_t{axis}, out);
}

int aclnnAddRmsNormGetWorkspaceSize(const aclTensor* x1, const aclTensor* x2,
                                    const aclTensor* gamma, double epsilon, const aclTensor* y,
                                    const aclTensor* rstd, const aclTensor* x,
                                    uint64_t* workspace_size, aclOpExecutor** executor) {
  CANN_HOST_PREPARES(aclnnAddRmsNormGetWorkspaceSize)
  return Prepare("aclnnAddRmsNorm", workspace_size, executor, x1, x2, gamma, epsilon, y, rstd, x);
}

int aclnnRmsNormGetWorkspaceSize(const aclTensor* x, const aclTensor* gamma, double epsilon,
                                 const aclTensor* y, const aclTensor* rstd,
                                 uint64_t* workspace_size, aclOpExecutor** executor) {
  CANN_HOST_PREPARES(aclnnRmsNormGetWorkspaceSize)
  return Prepare("aclnnRmsNorm", workspace_size, executor, x, gamma, epsilon, y, rstd);
}

int aclnnInplaceCopyGetWorkspaceSize(const aclTensor* self, const aclTensor* source,
                                     uint64_t* workspace_size, aclOpExecutor** executor) {
  CANN_HOST_PREPARES(aclnnInplaceCopyGetWorkspaceSize)
  return Prepare("aclnnInplaceCopy", workspace_size, executor, self, source);
}

int aclnnCastGetWorkspaceSize(const aclTensor* self, int dtype, const aclTensor* out,
                              uint64_t* workspace_size, aclOpExecutor** executor) {
  CANN_HOST_PREPARES(aclnnCastGetWorkspaceSize)
  return Prepare("aclnnCast", workspace_size, executor, self, int64_t{dtype}, out);
}

int aclnnConstantPadNdGetWorkspaceSize(const aclTensor* self, const aclIntArray* pad,
                                       const aclScalar* value, const aclTensor* out,
                                       uint64_t* workspace_size, aclOpExecutor** executor) {
  CANN_HOST_PREPARES(aclnnConstantPadNdGetWorkspaceSize)
  return Prepare("aclnnConstantPadNd", workspace_size, executor, self, pad, value, out);
}

int aclnnInplaceZeroGetWorkspaceSize(const aclTensor* self, uint64_t* workspace_size,
                                     aclOpExecutor** executor) {
  CANN_HOST_PREPARES(aclnnInplaceZeroGetWorkspaceSize)
  return Prepare("aclnnInplaceZero", workspace_size, executor, self);
}

int aclnnNpuFormatCastGetWorkspaceSize(const aclTensor* source, const aclTensor* out,
                                       uint64_t* workspace_size, aclOpExecutor** executor) {
  CANN_HOST_PREPARES(aclnnNpuFormatCastGetWorkspaceSize)
  return Prepare("aclnnNpuFormatCast", workspace_size, executor, source, out);
}

// The storage of a cast's result. The caller frees the dims with delete[]. additional_dtype is the
// type whose width decides C0, the columns of one block.
int aclnnNpuFormatCastCalculateSizeAndFormat(const aclTensor* source, int format,
                                             int additional_dtype, int64_t** dims, uint64_t* rank,
                                             int* actual_format) {
  CANN_HOST_CALL(aclnnNpuFormatCastCalculateSizeAndFormat);
  if (source == nullptr || dims == nullptr || rank == nullptr || actual_format == nullptr) {
    return Fail(kNullPointer, "aclnnNpuFormatCastCalculateSizeAndFormat: an argument is null");
  }
  if (!HandlesOf<aclTensor>().Has(source)) return NoHandle("aclnnNpuFormatCast", source);
  std::vector<int64_t> out = source->dims;
  for (const int64_t size : out) {
    if (size < 0 || size > std::numeric_limits<int64_t>::max() - kNzBytes) {
      return Fail(kInvalid, "aclnnNpuFormatCast: a size of %lld (CANN error %d)",
                  static_cast<long long>(size), kInvalid);
    }
  }
  if (format == kFormatNz) {
    const int64_t width = cann_host::DtypeBytes(additional_dtype);
    if (out.size() < 2 || width == 0 || width > 4) {
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

CANN_HOST_LAUNCH(aclnnAddRmsNorm)
CANN_HOST_LAUNCH(aclnnQuantize)
CANN_HOST_LAUNCH(aclnnTransQuantParamV3)
CANN_HOST_LAUNCH(aclnnTransQuantParamV2)
CANN_HOST_LAUNCH(aclnnQuantMatmulV5)
CANN_HOST_LAUNCH(aclnnQuantMatmulWeightNz)
CANN_HOST_LAUNCH(aclnnDynamicQuantV2)
CANN_HOST_LAUNCH(aclnnDynamicQuantV3)
CANN_HOST_LAUNCH(aclnnDynamicQuantV4)
CANN_HOST_LAUNCH(aclnnAscendQuantV3)
CANN_HOST_LAUNCH(aclnnInplaceCopy)
CANN_HOST_LAUNCH(aclnnCast)
CANN_HOST_LAUNCH(aclnnConstantPadNd)
CANN_HOST_LAUNCH(aclnnInplaceZero)
CANN_HOST_LAUNCH(aclnnNpuFormatCast)
CANN_HOST_LAUNCH(aclnnRmsNorm)
