// libopapi: writing into a cache. cann_host/aclnn/{cache,kv_cache}.py have their checks.
#include "aclnn.h"

#define GROUP "Operators (aclnn)"

CANN_HOST_OPERATOR(aclnnScatterNdUpdate, Tensor, Tensor, Tensor)
CANN_HOST_OPERATOR(aclnnInplaceScatterUpdate, Tensor, Tensor, Tensor, Int)
CANN_HOST_OPERATOR(aclnnScatterPaKvCache, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                   Tensor, Text, Text, Ints, Ints)
CANN_HOST_OPERATOR(aclnnKvRmsNormRopeCache, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                   Tensor, Tensor, Tensor, Tensor, Real, Text, Flag, Tensor, Tensor)
CANN_HOST_OPERATOR(aclnnKvRmsNormRopeCacheV2, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                   Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Real, Text, Flag, Tensor, Tensor)
