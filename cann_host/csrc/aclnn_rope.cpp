// libopapi: rotary embeddings. cann_host/aclnn/rope.py has their checks and computes them.
#include "aclnn.h"

#define GROUP "Operators (aclnn)"

CANN_HOST_OPERATOR(aclnnApplyRotaryPosEmb, Tensor, Tensor, Tensor, Tensor, Int)
CANN_HOST_OPERATOR(aclnnApplyRotaryPosEmbV2, Tensor, Tensor, Tensor, Tensor, Int, Text)
CANN_HOST_OPERATOR(aclnnRotaryPositionEmbedding, Tensor, Tensor, Tensor, Int, Tensor)
CANN_HOST_OPERATOR(aclnnRotaryPositionEmbeddingV2, Tensor, Tensor, Tensor, Int, Tensor, Tensor)
CANN_HOST_OPERATOR(aclnnRotaryPositionEmbeddingGrad, Tensor, Tensor, Tensor, Tensor, Int, Tensor,
                   Tensor, Tensor)
CANN_HOST_OPERATOR(aclnnInterleaveRope, Tensor, Tensor, Tensor, Tensor)
CANN_HOST_OPERATOR(aclnnRopeWithSinCosCache, Tensor, Tensor, Tensor, Tensor, Ints, Int, Flag,
                   Tensor, Tensor)
CANN_HOST_OPERATOR(aclnnRopeWithSinCosCacheV2, Tensor, Tensor, Tensor, Tensor, Ints, Int, Flag, Int,
                   Tensor, Tensor)
