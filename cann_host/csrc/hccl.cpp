// libhccl: collectives between devices. There is one device, so only the configuration is here;
// torch_npu looks every collective up by name and reports the ones it does not find.
#include "core.h"

struct HcclConfigValue {
  int value;
};

#define GROUP "Collectives (hccl)"

extern "C" int HcclSetConfig(int config, HcclConfigValue) {
  CANN_HOST_CALL(HcclSetConfig);
  // 0 asks for deterministic collectives. With no collectives, either answer is kept.
  if (config == 0) return cann_host::kSuccess;
  return cann_host::Fail(cann_host::kFeatureUnsupported,
                         "cann_host: HcclSetConfig: item %d is not implemented", config);
}
