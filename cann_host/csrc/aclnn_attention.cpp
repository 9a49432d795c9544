// libopapi: attention. cann_host/aclnn/attention.py has the names of the arguments.
#include "aclnn.h"

using namespace cann_host::aclnn;
using cann_host::Fail;
using cann_host::HandlesOf;
using cann_host::kSuccess;

#define GROUP "Operators (aclnn)"

// Sizes a workspace for every length that the sequences can get; torch_npu asks for it before it
// captures a graph. No executor is left.
#define CANN_HOST_MAX_WORKSPACE(op, ...)                                                      \
  extern "C" int op##GetMaxWorkspaceSize(                                                     \
      CANN_HOST_PARAMETERS(__VA_ARGS__) uint64_t* workspace_size, aclOpExecutor** executor) { \
    CANN_HOST_PREPARES(op##GetMaxWorkspaceSize)                                               \
    const int code = Prepare(#op, workspace_size, executor CANN_HOST_ARGUMENTS(__VA_ARGS__)); \
    if (code == kSuccess) {                                                                   \
      HandlesOf<aclOpExecutor>().Take(*executor);                                             \
      *executor = nullptr;                                                                    \
    }                                                                                         \
    return code;                                                                              \
  }

// The arguments that several versions begin or end with
#define QKV Tensor, Tensors, Tensors, Tensor, Tensor
#define SCALES Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
#define CACHE Tensor, Tensor, Tensor
#define SEPARATE Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Ints
#define NUMBERS Int, Real, Int, Int, Text, Int, Int, Int, Int, Int, Flag

#define FUSED_V1 QKV, Ints, Ints, SCALES, CACHE, NUMBERS, Tensor, Tensor
#define FUSED_V2 QKV, Ints, Ints, SCALES, CACHE, SEPARATE, NUMBERS, Int, Int, Tensor, Tensor
#define FUSED_V3                                                                               \
  QKV, Ints, Ints, SCALES, CACHE, SEPARATE, Tensor, Tensor, Tensor, NUMBERS, Int, Int, Tensor, \
      Tensor
#define FUSED_V4                                                                                  \
  QKV, Ints, Ints, SCALES, CACHE, SEPARATE, Tensor, Tensor, Tensor, Tensor, Tensor, NUMBERS, Int, \
      Int, Int, Tensor, Tensor

CANN_HOST_OPERATOR(aclnnFusedInferAttentionScore, FUSED_V1)
CANN_HOST_OPERATOR(aclnnFusedInferAttentionScoreV2, FUSED_V2)
CANN_HOST_OPERATOR(aclnnFusedInferAttentionScoreV3, FUSED_V3)
CANN_HOST_OPERATOR(aclnnFusedInferAttentionScoreV4, FUSED_V4)
CANN_HOST_MAX_WORKSPACE(aclnnFusedInferAttentionScoreV3, FUSED_V3)
CANN_HOST_MAX_WORKSPACE(aclnnFusedInferAttentionScoreV4, FUSED_V4)

CANN_HOST_OPERATOR(aclnnPromptFlashAttentionV3, Tensor, Tensor, Tensor, Tensor, Tensor, Ints, Ints,
                   Tensor, Tensor, Tensor, Tensor, Tensor, Int, Real, Int, Int, Text, Int, Int, Int,
                   Tensor)
CANN_HOST_OPERATOR(aclnnIncreFlashAttentionV4, QKV, Ints, SCALES, Tensor, Tensor, Int, Real, Text,
                   Int, Int, Int, Tensor)

#define FLASH_MASKS Tensor, Tensor, Tensor, Tensor
#define FLASH_QKV Tensor, Tensor, Tensor, FLASH_MASKS
#define FLASH_ROPE_QKV Tensor, Tensor, FLASH_QKV
#define FLASH_NUMBERS Real, Real, Int, Int, Int, Text, Int, Int
#define FLASH_OUT Tensor, Tensor, Tensor, Tensor

CANN_HOST_OPERATOR(aclnnFlashAttentionScore, FLASH_QKV, Ints, FLASH_NUMBERS, FLASH_OUT)
CANN_HOST_OPERATOR(aclnnFlashAttentionScoreV2, FLASH_QKV, Ints, Ints, Ints, FLASH_NUMBERS, Int,
                   FLASH_OUT)
CANN_HOST_OPERATOR(aclnnFlashAttentionScoreV3, FLASH_QKV, Tensor, Ints, Ints, Ints, FLASH_NUMBERS,
                   Int, FLASH_OUT)
CANN_HOST_OPERATOR(aclnnFlashAttentionVarLenScore, FLASH_QKV, Ints, Ints, Ints, FLASH_NUMBERS,
                   FLASH_OUT)
CANN_HOST_OPERATOR(aclnnFlashAttentionVarLenScoreV2, FLASH_QKV, Ints, Ints, Ints, Ints, Ints,
                   FLASH_NUMBERS, Int, FLASH_OUT)
CANN_HOST_OPERATOR(aclnnFlashAttentionVarLenScoreV3, FLASH_ROPE_QKV, Ints, Ints, Ints, Ints, Ints,
                   FLASH_NUMBERS, Int, FLASH_OUT)
CANN_HOST_OPERATOR(aclnnFlashAttentionVarLenScoreV4, FLASH_QKV, Ints, Ints, Ints, FLASH_NUMBERS,
                   Text, FLASH_OUT)
CANN_HOST_OPERATOR(aclnnFlashAttentionVarLenScoreV5, FLASH_ROPE_QKV, Tensor, Ints, Ints, Ints, Ints,
                   Ints, FLASH_NUMBERS, Int, Text, FLASH_OUT)

#define FLASH_BACKWARD Tensor, FLASH_QKV, Tensor, Tensor, Tensor, Tensor

CANN_HOST_OPERATOR(aclnnFlashAttentionScoreGrad, FLASH_BACKWARD, Ints, FLASH_NUMBERS, FLASH_OUT)
CANN_HOST_OPERATOR(aclnnFlashAttentionScoreGradV2, FLASH_BACKWARD, Ints, Ints, Ints, FLASH_NUMBERS,
                   Int, FLASH_OUT)
CANN_HOST_OPERATOR(aclnnFlashAttentionUnpaddingScoreGrad, FLASH_BACKWARD, Ints, Ints, Ints,
                   FLASH_NUMBERS, FLASH_OUT)
CANN_HOST_OPERATOR(aclnnFlashAttentionUnpaddingScoreGradV4, FLASH_BACKWARD, Ints, Ints, Ints,
                   FLASH_NUMBERS, FLASH_OUT, Text)

extern "C" {

int aclDestroyAclOpExecutor(aclOpExecutor* executor) {
  CANN_HOST_CALL(aclDestroyAclOpExecutor);
  if (executor == nullptr || HandlesOf<aclOpExecutor>().Take(executor) != nullptr) return kSuccess;
  return NoHandle("aclDestroyAclOpExecutor", executor);
}

}  // extern "C"
