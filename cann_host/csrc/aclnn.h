// How an operator of libopapi is called. ...GetWorkspaceSize validates and copies the descriptors,
// because torch_npu destroys its own before the launch runs on another thread; the launch computes and
// frees the copy. Both phases end in one Python function (cann_host/aclnn).
//
// A call is passed to Python as a flat list of 64-bit words, one group for each argument:
//   absent tensor  0
//   tensor         1, address, dtype, format, offset, rank, dims..., strides...,
//                  storage rank, storage dims...
//   number         2, value
//   real number    3, bits of the double
//   integers       4, how many, values...
//   text           5, bytes, the bytes in words
//   tensors        6, how many, each as above
// An absent list, scalar or text is 0 too.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "core.h"
#include "python.h"

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

struct aclBoolArray {
  std::vector<int64_t> values;
};

// It owns its tensors. A place may be empty.
struct aclTensorList {
  std::vector<const aclTensor*> tensors;
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
  std::vector<cann_host::Reach> reaches;
  bool is_checked;                // by Python
  std::function<void()> abandon;  // its arguments
};

namespace cann_host {
namespace aclnn {

constexpr int kNullPointer = 161001;   // ACLNN_ERR_PARAM_NULLPTR
constexpr int kInvalid = 161002;       // ACLNN_ERR_PARAM_INVALID
constexpr int kRuntimeError = 361001;  // ACLNN_ERR_RUNTIME_ERROR
constexpr int kInternal = 561000;      // ACLNN_ERR_INNER

constexpr int kFormatNd = 2;
constexpr int kFormatNz = 29;
constexpr int64_t kNzRows = 16;
constexpr int64_t kNzBytes = 32;

enum Phase : int { kCheck = 0, kRun = 1 };

// Python's half of an operator: checks the words, or computes.
int Call(const char* op, Phase phase, const std::vector<int64_t>& words);

// Fails with a text: there is no such object.
int NoHandle(const char* op, const void* handle);

// A tensor must lie in memory that was allocated here: a read past it would be garbage or a crash.
int Check(const char* op, std::vector<Reach>& reaches, const aclTensor* tensor);
inline int Check(const char*, std::vector<Reach>&, int64_t) { return kSuccess; }
inline int Check(const char*, std::vector<Reach>&, double) { return kSuccess; }
inline int Check(const char*, std::vector<Reach>&, const char*) { return kSuccess; }
int Check(const char* op, std::vector<Reach>& reaches, const aclTensorList* list);

// Lists of numbers and scalars.
template <typename T>
int Check(const char* op, std::vector<Reach>&, const T* argument) {
  return argument == nullptr || HandlesOf<T>().Has(argument) ? kSuccess : NoHandle(op, argument);
}

void Pack(std::vector<int64_t>& words, const aclTensor* tensor);
void Pack(std::vector<int64_t>& words, int64_t number);
void Pack(std::vector<int64_t>& words, double number);
void Pack(std::vector<int64_t>& words, const aclIntArray* array);
void Pack(std::vector<int64_t>& words, const aclBoolArray* array);
void Pack(std::vector<int64_t>& words, const aclTensorList* list);
void Pack(std::vector<int64_t>& words, const char* text);
void Pack(std::vector<int64_t>& words, const aclScalar* scalar);

// The function to call for an argument after its call has failed: see Handles::Abandon.
inline std::function<void()> Abandoning(int64_t) {
  return [] {};
}
inline std::function<void()> Abandoning(double) {
  return [] {};
}
inline std::function<void()> Abandoning(const char*) {
  return [] {};
}
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
  int code = Fault((std::string(op) + "GetWorkspaceSize").c_str());
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
  // A thread that Python does not know leaves the check to the launch: a thread that waits for this one
  // may hold Python's lock (see IsLate).
  const bool checks = GetPython() == nullptr || IsPythonThread();
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
  return ReportLaunch(Prepared(arguments...));
}

// The second phase.
int Launch(const char* op, aclOpExecutor* executor, void* stream);

}  // namespace aclnn
}  // namespace cann_host

// ---- a line for each operator ----
//   CANN_HOST_OPERATOR(aclnnRmsNorm, Tensor, Tensor, Real, Tensor, Tensor)
// defines its two functions: the types are those of CANN's own header, in its order. A record of
// cann_host/aclnn has the names of the arguments, what is refused and what is computed.

namespace cann_host {
namespace aclnn {

using Tensor = const aclTensor*;
using Tensors = const aclTensorList*;
using Ints = const aclIntArray*;
using Flags = const aclBoolArray*;
using Scalar = const aclScalar*;
using Text = const char*;
using Int = int64_t;
using Int32 = int32_t;  // an aclDataType too
using Flag = bool;
using Real = double;
using Single = float;

}  // namespace aclnn
}  // namespace cann_host

#define CANN_HOST_EXPAND(...) \
  CANN_HOST_EXPAND3(CANN_HOST_EXPAND3(CANN_HOST_EXPAND3(CANN_HOST_EXPAND3(__VA_ARGS__))))
#define CANN_HOST_EXPAND3(...) \
  CANN_HOST_EXPAND2(CANN_HOST_EXPAND2(CANN_HOST_EXPAND2(CANN_HOST_EXPAND2(__VA_ARGS__))))
#define CANN_HOST_EXPAND2(...) \
  CANN_HOST_EXPAND1(CANN_HOST_EXPAND1(CANN_HOST_EXPAND1(CANN_HOST_EXPAND1(__VA_ARGS__))))
#define CANN_HOST_EXPAND1(...) __VA_ARGS__
#define CANN_HOST_PARENS ()

// Tensor, Int -> Tensor a, Int a1,
#define CANN_HOST_PARAMETERS(...) __VA_OPT__(CANN_HOST_EXPAND(CANN_HOST_PARAMETER(a, __VA_ARGS__)))
#define CANN_HOST_PARAMETER(name, type, ...) \
  cann_host::aclnn::type name,               \
      __VA_OPT__(CANN_HOST_PARAMETER_AGAIN CANN_HOST_PARENS(name##1, __VA_ARGS__))
#define CANN_HOST_PARAMETER_AGAIN() CANN_HOST_PARAMETER

// Tensor, Int -> , Sent(a), Sent(a1)
#define CANN_HOST_ARGUMENTS(...) __VA_OPT__(CANN_HOST_EXPAND(CANN_HOST_ARGUMENT(a, __VA_ARGS__)))
#define CANN_HOST_ARGUMENT(name, type, ...) \
  , cann_host::aclnn::Sent(name)            \
        __VA_OPT__(CANN_HOST_ARGUMENT_AGAIN CANN_HOST_PARENS(name##1, __VA_ARGS__))
#define CANN_HOST_ARGUMENT_AGAIN() CANN_HOST_ARGUMENT

namespace cann_host {
namespace aclnn {

// Numbers are sent in 64 bits.
inline int64_t Sent(int64_t number) { return number; }
inline int64_t Sent(int32_t number) { return number; }
inline int64_t Sent(bool flag) { return flag; }
inline double Sent(double number) { return number; }
inline double Sent(float number) { return number; }
template <typename T>
const T* Sent(const T* argument) {
  return argument;
}

}  // namespace aclnn
}  // namespace cann_host

// Begins the first phase of an operator. Prepare, which ends it, looks for a fault on demand.
#define CANN_HOST_PREPARES(symbol) CANN_HOST_ENTRY(symbol, "does")

// The second phase of an operator.
#define CANN_HOST_LAUNCH(op)                                                         \
  extern "C" int op(void*, uint64_t, aclOpExecutor* executor, void* stream) {        \
    CANN_HOST_ENTRY(op, "does")                                                      \
    return cann_host::ReportLaunch(cann_host::aclnn::Launch(#op, executor, stream)); \
  }

#define CANN_HOST_OPERATOR(op, ...)                                                               \
  extern "C" int op##GetWorkspaceSize(CANN_HOST_PARAMETERS(__VA_ARGS__) uint64_t* workspace_size, \
                                      aclOpExecutor** executor) {                                 \
    CANN_HOST_PREPARES(op##GetWorkspaceSize)                                                      \
    return cann_host::aclnn::Prepare(#op, workspace_size,                                         \
                                     executor CANN_HOST_ARGUMENTS(__VA_ARGS__));                  \
  }                                                                                               \
  CANN_HOST_LAUNCH(op)
