// Symbols that the wheel's libraries are linked against and that are not implemented here. Calling one
// fails with a text that names it; functions that return a pointer return null.
// The C ABI lets a definition without parameters stand for any signature.
#include "core.h"

#define CANN_HOST_FAILS(symbol)    \
  CANN_HOST_ENTRY(symbol, "fails") \
  extern "C" int symbol() { return cann_host::Unimplemented(#symbol); }

#define CANN_HOST_RETURNS_NULL(symbol) \
  CANN_HOST_ENTRY(symbol, "fails")     \
  extern "C" void* symbol() {          \
    cann_host::Unimplemented(#symbol); \
    return nullptr;                    \
  }

// For functions that return the value that they read, not a code.
#define CANN_HOST_READS(type, symbol, nothing) \
  CANN_HOST_ENTRY(symbol, "fails")             \
  extern "C" type symbol() {                   \
    cann_host::Unimplemented(#symbol);         \
    return nothing;                            \
  }

#define GROUP "Dumps"
CANN_HOST_FAILS(aclmdlInitDump)
CANN_HOST_FAILS(aclmdlSetDump)
CANN_HOST_FAILS(aclmdlFinalizeDump)
CANN_HOST_FAILS(aclopStartDumpArgs)
CANN_HOST_FAILS(aclopStopDumpArgs)

#undef GROUP
#define GROUP "Kernels of your own"
CANN_HOST_FAILS(aclrtBinaryGetFunction)
CANN_HOST_FAILS(aclrtBinaryLoadFromData)
CANN_HOST_FAILS(aclrtGetFunctionAddr)
CANN_HOST_FAILS(rtDevBinaryRegister)
CANN_HOST_FAILS(rtFunctionRegister)
CANN_HOST_FAILS(rtGetC2cCtrlAddr)
CANN_HOST_FAILS(rtKernelLaunch)

#undef GROUP
#define GROUP "Memory that processes share"
CANN_HOST_FAILS(aclrtDeviceGetBareTgid)
CANN_HOST_FAILS(aclrtMemExportToShareableHandle)
CANN_HOST_FAILS(aclrtMemImportFromShareableHandle)
CANN_HOST_FAILS(aclrtMemSetPidToShareableHandle)

// torch_npu until 2.9 is linked against it; it gives one process the communicators of several devices.
#undef GROUP
#define GROUP "Collectives (hccl)"
CANN_HOST_FAILS(HcclCommInitAll)

#undef GROUP
#define GROUP "Host callbacks"
CANN_HOST_FAILS(aclrtProcessReport)

#undef GROUP
#define GROUP "Profiler"
CANN_HOST_FAILS(msptiActivityDisable)
CANN_HOST_FAILS(msptiActivityEnable)
CANN_HOST_FAILS(msptiActivityFlushAll)
CANN_HOST_FAILS(msptiActivityGetNextRecord)
CANN_HOST_READS(bool, msptiActivityIsEnabled, false)
CANN_HOST_FAILS(msptiActivityPopExternalCorrelationId)
CANN_HOST_FAILS(msptiActivityPushExternalCorrelationId)
CANN_HOST_FAILS(msptiActivityRegisterCallbacks)
CANN_HOST_FAILS(msptiSubscribe)
CANN_HOST_FAILS(msptiUnsubscribe)

#undef GROUP
#define GROUP "Channels"
CANN_HOST_RETURNS_NULL(acltdtCreateChannelWithCapacity)
CANN_HOST_RETURNS_NULL(acltdtCreateDataset)
CANN_HOST_RETURNS_NULL(acltdtGetDataAddrFromItem)
CANN_HOST_RETURNS_NULL(acltdtGetDataItem)
CANN_HOST_FAILS(acltdtDestroyChannel)
CANN_HOST_FAILS(acltdtDestroyDataset)
CANN_HOST_FAILS(acltdtGetDimsFromItem)
CANN_HOST_FAILS(acltdtReceiveTensor)

// With no dataset there is nothing to read.
CANN_HOST_READS(long, acltdtGetDataSizeFromItem, 0)
CANN_HOST_READS(int, acltdtGetDataTypeFromItem, -1)  // ACL_DT_UNDEFINED
CANN_HOST_READS(long, acltdtGetDatasetSize, 0)
CANN_HOST_READS(long, acltdtGetDimNumFromItem, 0)
