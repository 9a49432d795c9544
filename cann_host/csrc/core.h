// What every file of the stand-in needs: error texts, and failing by name.
#pragma once

#include <cstdint>
#include <functional>

namespace cann_host {

// Codes of the public ACL headers, the ones this library returns.
enum : int {
  kSuccess = 0,
  kInvalidParam = 100000,
  kUninitialized = 100001,
  kBadAlloc = 200000,
  kInvalidDevice = 200002,
  kFeatureUnsupported = 200006,
  kFailure = 500001,
};

// Keeps the text as the recent error and returns the code.
int Fail(int code, const char* fmt, ...) __attribute__((format(printf, 2, 3)));

// Fails with a text that names the symbol: a call nobody implemented must never look like success.
int Unimplemented(const char* symbol);

// The text for aclGetRecentErrMsg and GEGetErrorMsg; empty if nothing failed yet.
// The pointer stays valid until this thread asks again.
const char* RecentError();

// Work on a stream: done at once, or kept while a graph is captured on it.
using Task = std::function<int()>;
int RunOrCapture(void* stream, Task task);

// The CANN version and the product this process pretends to run on.
const char* CannVersion();
const char* SocName();

}  // namespace cann_host
