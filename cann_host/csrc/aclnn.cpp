// libopapi: the operators, two functions each. cann_host/aclnn has their checks and computes them.
#include "aclnn.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <limits>

using namespace cann_host::aclnn;
using cann_host::Fail;
using cann_host::HandlesOf;
using cann_host::kSuccess;

#define GROUP "Operators (aclnn)"

CANN_HOST_OPERATOR(aclnnTransQuantParamV3, Tensor, Tensor, Int, Tensor)
CANN_HOST_OPERATOR(aclnnQuantMatmulV5, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                   Tensor, Tensor, Flag, Flag, Int, Tensor)
CANN_HOST_OPERATOR(aclnnQuantMatmulWeightNz, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                   Tensor, Tensor, Flag, Flag, Int, Tensor)
CANN_HOST_OPERATOR(aclnnDynamicQuantV2, Tensor, Tensor, Tensor, Int, Tensor, Tensor, Tensor)
CANN_HOST_OPERATOR(aclnnQuantize, Tensor, Tensor, Tensor, Int32, Int32, Tensor)
CANN_HOST_OPERATOR(aclnnAddRmsNorm, Tensor, Tensor, Tensor, Real, Tensor, Tensor, Tensor)
CANN_HOST_OPERATOR(aclnnRmsNorm, Tensor, Tensor, Real, Tensor, Tensor)
CANN_HOST_OPERATOR(aclnnInplaceCopy, Tensor, Tensor)
CANN_HOST_OPERATOR(aclnnCast, Tensor, Int32, Tensor)
CANN_HOST_OPERATOR(aclnnConstantPadNd, Tensor, Ints, Scalar, Tensor)
CANN_HOST_OPERATOR(aclnnInplaceZero, Tensor)
CANN_HOST_OPERATOR(aclnnNpuFormatCast, Tensor, Tensor)

extern "C" {

int aclnnTransQuantParamV2GetWorkspaceSize(const aclTensor* scale, const aclTensor* offset,
                                           const aclTensor* out, uint64_t* workspace_size,
                                           aclOpExecutor** executor) {
  CANN_HOST_PREPARES(aclnnTransQuantParamV2GetWorkspaceSize)
  return Prepare("aclnnTransQuantParamV2", workspace_size, executor, scale, offset, int64_t{0},
                 out);
}

// Python gets the arguments in the order of V5.
int aclnnQuantMatmulV4GetWorkspaceSize(const aclTensor* x1, const aclTensor* x2,
                                       const aclTensor* scale, const aclTensor* offset,
                                       const aclTensor* pertoken_scale, const aclTensor* bias,
                                       bool transpose_x1, bool transpose_x2, const aclTensor* out,
                                       uint64_t* workspace_size, aclOpExecutor** executor) {
  CANN_HOST_PREPARES(aclnnQuantMatmulV4GetWorkspaceSize)
  const aclTensor* none = nullptr;
  return Prepare("aclnnQuantMatmulV4", workspace_size, executor, x1, x2, pertoken_scale, scale,
                 none, none, offset, none, bias, int64_t{transpose_x1}, int64_t{transpose_x2},
                 int64_t{0}, out);
}

int aclnnDynamicQuantGetWorkspaceSize(const aclTensor* x, const aclTensor* smooth_scales,
                                      const aclTensor* y, const aclTensor* scale,
                                      uint64_t* workspace_size, aclOpExecutor** executor) {
  CANN_HOST_PREPARES(aclnnDynamicQuantGetWorkspaceSize)
  const aclTensor* none = nullptr;
  return Prepare("aclnnDynamicQuant", workspace_size, executor, x, smooth_scales, none, int64_t{0},
                 y, scale, none);
}

// A text is passed to Python as its index in a list, -1 if it is not in the list: QUANT_MODES of the
// rules for quant_mode, ROUND_MODES of aclnn for round_mode.
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

static int64_t Rounding(const char* text) {
  return PlaceOf(text, {"round", "floor", "ceil", "trunc"});
}

int aclnnAscendQuantGetWorkspaceSize(const aclTensor* x, const aclTensor* scale,
                                     const aclTensor* offset, bool sqrt_mode,
                                     const char* round_mode, int32_t dst_type, const aclTensor* y,
                                     uint64_t* workspace_size, aclOpExecutor** executor) {
  CANN_HOST_PREPARES(aclnnAscendQuantGetWorkspaceSize)
  return Prepare("aclnnAscendQuant", workspace_size, executor, x, scale, offset, int64_t{sqrt_mode},
                 Rounding(round_mode), int64_t{dst_type}, int64_t{-1}, y);
}

int aclnnAscendQuantV3GetWorkspaceSize(const aclTensor* x, const aclTensor* scale,
                                       const aclTensor* offset, bool sqrt_mode,
                                       const char* round_mode, int32_t dst_type, int32_t axis,
                                       const aclTensor* y, uint64_t* workspace_size,
                                       aclOpExecutor** executor) {
  CANN_HOST_PREPARES(aclnnAscendQuantV3GetWorkspaceSize)
  return Prepare("aclnnAscendQuantV3", workspace_size, executor, x, scale, offset,
                 int64_t{sqrt_mode}, Rounding(round_mode), int64_t{dst_type}, int64_t{axis}, y);
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
    // torch_npu then moves the bytes with Identity. If this were taken, its npu_format_cast_ and its
    // copy_ to an internal format would cast the old values once more and drop the new ones.
    if (source->format == kFormatNz) {
      return Fail(kRuntimeError,
                  "aclnnNpuFormatCast: the tensor is FRACTAL_NZ already (CANN error %d)",
                  kRuntimeError);
    }
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

CANN_HOST_LAUNCH(aclnnTransQuantParamV2)
CANN_HOST_LAUNCH(aclnnQuantMatmulV4)
CANN_HOST_LAUNCH(aclnnDynamicQuant)
CANN_HOST_LAUNCH(aclnnDynamicQuantV3)
CANN_HOST_LAUNCH(aclnnDynamicQuantV4)
CANN_HOST_LAUNCH(aclnnAscendQuant)
CANN_HOST_LAUNCH(aclnnAscendQuantV3)
