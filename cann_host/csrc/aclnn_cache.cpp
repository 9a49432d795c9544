// libopapi: writing into a cache. cann_host/aclnn/cache.py has their checks and computes them.
#include "aclnn.h"

#define GROUP "Operators (aclnn)"

CANN_HOST_OPERATOR(aclnnScatterNdUpdate, Tensor, Tensor, Tensor)
CANN_HOST_OPERATOR(aclnnInplaceScatterUpdate, Tensor, Tensor, Tensor, Int)
