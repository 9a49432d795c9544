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
#pragma once

#include <cstdint>
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

constexpr int kNullPointer = 161001;  // ACLNN_ERR_PARAM_NULLPTR
constexpr int kInvalid = 161002;      // ACLNN_ERR_PARAM_INVALID
constexpr int kInternal = 561000;     // ACLNN_ERR_INNER

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

// Lists and scalars, which an operator always has.
template <typename T>
int Check(const char* op, std::vector<Reach>&, const T* argument) {
  if (argument == nullptr) return Fail(kNullPointer, "%s: an argument is null", op);
  return HandlesOf<T>().Has(argument) ? kSuccess : NoHandle(op, argument);
}

void Pack(std::vector<int64_t>& words, const aclTensor* tensor);
void Pack(std::vector<int64_t>& words, int64_t number);
void Pack(std::vector<int64_t>& words, double number);
void Pack(std::vector<int64_t>& words, const aclIntArray* array);
void Pack(std::vector<int64_t>& words, const aclScalar* scalar);

// The function to call for an argument after its call has failed: see Handles::Abandon.
inline std::function<void()> Abandoning(int64_t) {
  return [] {};
}
inline std::function<void()> Abandoning(double) {
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
