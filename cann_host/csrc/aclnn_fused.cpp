// Operators of libopapi that do the work of several: norms and SwiGLU that quantize.
#include "aclnn.h"

#define GROUP "Operators (aclnn)"

CANN_HOST_OPERATOR(aclnnAddRmsNormCast, Tensor, Tensor, Tensor, Real, Tensor, Tensor, Tensor,
                   Tensor)
CANN_HOST_OPERATOR(aclnnInplaceAddRmsNorm, Tensor, Tensor, Tensor, Real, Tensor)
CANN_HOST_OPERATOR(aclnnAddRmsNormDynamicQuantV2, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                   Real, Flags, Tensor, Tensor, Tensor, Tensor, Tensor)
CANN_HOST_OPERATOR(aclnnAddRmsNormQuant, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                   Int, Real, Flag, Tensor, Tensor, Tensor)
CANN_HOST_OPERATOR(aclnnAddRmsNormQuantV2, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                   Tensor, Int, Real, Flag, Tensor, Tensor, Tensor, Tensor)
CANN_HOST_OPERATOR(aclnnRmsNormQuant, Tensor, Tensor, Tensor, Tensor, Tensor, Real, Tensor)
CANN_HOST_OPERATOR(aclnnSwiGlu, Tensor, Int, Tensor)
CANN_HOST_OPERATOR(aclnnSwiGluGrad, Tensor, Tensor, Int, Tensor)
CANN_HOST_OPERATOR(aclnnSwiGluQuantV2, Tensor, Tensor, Tensor, Tensor, Flag, Text, Int, Int, Tensor,
                   Tensor)
CANN_HOST_OPERATOR(aclnnDequantSwigluQuant, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                   Flag, Text, Tensor, Tensor)
CANN_HOST_OPERATOR(aclnnDequantSwigluQuantV2, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                   Tensor, Flag, Text, Int, Text, Int, Int, Real, Real, Real, Tensor, Tensor)
