// libopapi: the descriptors that operators take, and the two phases of a call. See aclnn.h.
#include "aclnn.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "bindings.h"

namespace cann_host {
namespace aclnn {
namespace {

constexpr uint64_t kMostDims = 64;        // torch's own limit; CANN's operators take 8
constexpr uint64_t kMostItems = 1 << 20;  // of a list

PythonFunction run_in_python;  // of the operator, the phase, and the words' address and number

template <typename T>
int Destroy(const char* op, const T* handle) {
  if (handle == nullptr || HandlesOf<T>().Take(handle)) return kSuccess;
  return NoHandle(op, handle);
}

// Whether a caller's list may be read.
bool IsList(const char* op, const void* items, uint64_t size) {
  if (size <= kMostItems && (size == 0 || items != nullptr)) return true;
  Fail(kInvalid, "%s: %llu items, or a null list of them", op,
       static_cast<unsigned long long>(size));
  return false;
}

}  // namespace

int Call(const char* op, Phase phase, const std::vector<int64_t>& words) {
  return run_in_python.Call(
      op, kInternal, "(siKK)", op, static_cast<int>(phase),
      static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(words.data())),
      static_cast<unsigned long long>(words.size()));
}

int NoHandle(const char* op, const void* handle) {
  return Fail(kInvalid, "%s: %p was not made here, or is destroyed (CANN error %d)", op, handle,
              kInvalid);
}

int Check(const char* op, std::vector<Reach>& reaches, const aclTensor* tensor) {
  if (tensor == nullptr) return kSuccess;
  if (!HandlesOf<aclTensor>().Has(tensor)) return NoHandle(op, tensor);
  const int64_t width = DtypeBytes(tensor->dtype);
  if (width == 0) {
    return Fail(kInvalid, "%s: cann_host does not know aclDataType %d", op, tensor->dtype);
  }
  // This checks the bytes that are read: the storage of FRACTAL_NZ, the dims of any other format.
  const auto& sizes = tensor->format == kFormatNz ? tensor->storage : tensor->dims;
  const bool is_empty = std::count(sizes.begin(), sizes.end(), 0) != 0;
  bool fits = tensor->offset >= 0 && reinterpret_cast<uintptr_t>(tensor->data) % width == 0;
  int64_t bytes = 1;
  if (tensor->format == kFormatNz) {
    for (const int64_t size : tensor->storage) {
      fits = fits && size >= 0 && !__builtin_mul_overflow(bytes, size, &bytes);
    }
  } else {
    int64_t step = 0;
    fits = fits && !__builtin_add_overflow(bytes, tensor->offset, &bytes);
    for (size_t i = 0; i < tensor->dims.size(); ++i) {
      const int64_t size = tensor->dims[i], stride = tensor->strides[i];
      fits = fits && size >= 0 && stride >= 0 && !__builtin_mul_overflow(size - 1, stride, &step) &&
             !__builtin_add_overflow(bytes, step, &bytes);
    }
  }
  fits = fits && !__builtin_mul_overflow(bytes, width, &bytes);
  if (fits && is_empty) return kSuccess;
  // With a stride of 0, a large tensor needs little memory. A tensor that no device could hold is
  // refused: to compute it would never end.
  int64_t whole = width;
  for (const int64_t size : tensor->dims) {
    fits = fits && !__builtin_mul_overflow(whole, size, &whole);
  }
  fits = fits && whole <= static_cast<int64_t>(DeviceBytes());
  if (fits) {
    reaches.push_back(ReachOf(tensor->data, static_cast<size_t>(bytes)));
    if (reaches.back().block != 0) return kSuccess;
  }
  return Fail(
      kInvalid,
      "%s: a tensor of %zu dims at %p does not lie in memory that was allocated here, or not at "
      "a multiple of the element size (CANN error %d)",
      op, tensor->dims.size(), tensor->data, kInvalid);
}

int Check(const char* op, std::vector<Reach>& reaches, const aclTensorList* list) {
  if (list == nullptr) return kSuccess;
  if (!HandlesOf<aclTensorList>().Has(list)) return NoHandle(op, list);
  int code = kSuccess;
  for (const aclTensor* tensor : list->tensors) {
    if (code == kSuccess) code = Check(op, reaches, tensor);
  }
  return code;
}

namespace {

void PackIntegers(std::vector<int64_t>& words, const std::vector<int64_t>& values) {
  words.insert(words.end(), {4, static_cast<int64_t>(values.size())});
  words.insert(words.end(), values.begin(), values.end());
}

}  // namespace

void Pack(std::vector<int64_t>& words, const aclTensor* tensor) {
  if (tensor == nullptr) {
    words.push_back(0);
    return;
  }
  words.insert(words.end(),
               {1, reinterpret_cast<int64_t>(tensor->data), tensor->dtype, tensor->format,
                tensor->offset, static_cast<int64_t>(tensor->dims.size())});
  words.insert(words.end(), tensor->dims.begin(), tensor->dims.end());
  words.insert(words.end(), tensor->strides.begin(), tensor->strides.end());
  words.push_back(static_cast<int64_t>(tensor->storage.size()));
  words.insert(words.end(), tensor->storage.begin(), tensor->storage.end());
}

void Pack(std::vector<int64_t>& words, int64_t number) { words.insert(words.end(), {2, number}); }

void Pack(std::vector<int64_t>& words, double number) {
  int64_t bits = 0;
  std::memcpy(&bits, &number, sizeof(bits));
  words.insert(words.end(), {3, bits});
}

void Pack(std::vector<int64_t>& words, const aclIntArray* array) {
  if (array == nullptr) {
    words.push_back(0);
  } else {
    PackIntegers(words, array->values);
  }
}

void Pack(std::vector<int64_t>& words, const aclBoolArray* array) {
  if (array == nullptr) {
    words.push_back(0);
  } else {
    PackIntegers(words, array->values);
  }
}

void Pack(std::vector<int64_t>& words, const aclTensorList* list) {
  if (list == nullptr) {
    words.push_back(0);
    return;
  }
  words.insert(words.end(), {6, static_cast<int64_t>(list->tensors.size())});
  for (const aclTensor* tensor : list->tensors) Pack(words, tensor);
}

void Pack(std::vector<int64_t>& words, const char* text) {
  if (text == nullptr) {
    words.push_back(0);
    return;
  }
  const size_t bytes = std::strlen(text);
  words.insert(words.end(), {5, static_cast<int64_t>(bytes)});
  const size_t at = words.size();
  words.resize(at + (bytes + 7) / 8);
  std::memcpy(words.data() + at, text, bytes);
}

void Pack(std::vector<int64_t>& words, const aclScalar* scalar) {
  if (scalar == nullptr) {
    words.push_back(0);
  } else if (scalar->is_real) {
    Pack(words, scalar->real);
  } else {
    Pack(words, scalar->integer);
  }
}

int Launch(const char* op, aclOpExecutor* executor, void* stream) {
  // taken first: a launch that fails, on demand too, consumes its executor
  const std::shared_ptr<const aclOpExecutor> call = HandlesOf<aclOpExecutor>().Take(executor);
  int code = Fault(op);
  if (code == kSuccess && (call == nullptr || std::strcmp(call->op, op) != 0)) {
    return Fail(kNullPointer, "%s was launched without its own executor", op);
  }
  if (code == kSuccess) {
    code = OnStream(op, stream, [call] {
      // this may run much later, and several times in a captured graph
      for (const Reach& reach : call->reaches) {
        if (!IsThere(reach)) {
          return Fail(kInvalid, "%s: %zu bytes at %p are no longer allocated (CANN error %d)",
                      call->op, reach.bytes, reach.data, kInvalid);
        }
      }
      const int refused = call->is_checked ? kSuccess : Call(call->op, kCheck, call->words);
      return refused ? refused : Call(call->op, kRun, call->words);
    });
  }
  if (code != kSuccess && call != nullptr) call->abandon();
  return code;
}

}  // namespace aclnn
}  // namespace cann_host

using namespace cann_host::aclnn;
using cann_host::Fail;
using cann_host::HandlesOf;
using cann_host::kSuccess;

// The Python side; null when the interpreter is about to end.
void cann_host_set_aclnn_executor(void* run) { run_in_python.Set(run); }

#define GROUP "Operators (aclnn)"

extern "C" {

CANN_HOST_ENTRY(aclCreateTensor, "makes")
aclTensor* aclCreateTensor(const int64_t* dims, uint64_t rank, int dtype, const int64_t* strides,
                           int64_t offset, int format, const int64_t* storage,
                           uint64_t storage_rank, void* data) {
  if (rank > kMostDims || storage_rank > kMostDims || (rank && !(dims && strides)) ||
      (storage_rank && !storage)) {
    Fail(kInvalid, "aclCreateTensor: %llu dims and %llu stored ones, or a null list of them",
         static_cast<unsigned long long>(rank), static_cast<unsigned long long>(storage_rank));
    return nullptr;
  }
  return HandlesOf<aclTensor>().Give({{dims, dims + rank},
                                      {strides, strides + rank},
                                      {storage, storage + storage_rank},
                                      dtype,
                                      format,
                                      offset,
                                      data});
}

int aclDestroyTensor(const aclTensor* tensor) {
  CANN_HOST_CALL(aclDestroyTensor);
  return Destroy("aclDestroyTensor", tensor);
}

CANN_HOST_ENTRY(aclCreateIntArray, "makes")
aclIntArray* aclCreateIntArray(const int64_t* values, uint64_t size) {
  if (!IsList("aclCreateIntArray", values, size)) return nullptr;
  return HandlesOf<aclIntArray>().Give({{values, values + size}});
}

int aclDestroyIntArray(const aclIntArray* array) {
  CANN_HOST_CALL(aclDestroyIntArray);
  return Destroy("aclDestroyIntArray", array);
}

CANN_HOST_ENTRY(aclCreateBoolArray, "makes")
aclBoolArray* aclCreateBoolArray(const bool* values, uint64_t size) {
  if (!IsList("aclCreateBoolArray", values, size)) return nullptr;
  return HandlesOf<aclBoolArray>().Give({{values, values + size}});
}

int aclDestroyBoolArray(const aclBoolArray* array) {
  CANN_HOST_CALL(aclDestroyBoolArray);
  return Destroy("aclDestroyBoolArray", array);
}

CANN_HOST_ENTRY(aclCreateTensorList, "makes")
aclTensorList* aclCreateTensorList(const aclTensor* const* tensors, uint64_t size) {
  if (!IsList("aclCreateTensorList", tensors, size)) return nullptr;
  return HandlesOf<aclTensorList>().Give({{tensors, tensors + size}});
}

int aclDestroyTensorList(const aclTensorList* list) {
  CANN_HOST_CALL(aclDestroyTensorList);
  if (list == nullptr) return kSuccess;
  const auto taken = HandlesOf<aclTensorList>().Take(list);
  if (taken == nullptr) return NoHandle("aclDestroyTensorList", list);
  int code = kSuccess;
  for (const aclTensor* tensor : taken->tensors) {
    const int destroyed = Destroy("aclDestroyTensorList", tensor);
    if (code == kSuccess) code = destroyed;
  }
  return code;
}

// torch_npu makes float, double, int64 and bool scalars.
CANN_HOST_ENTRY(aclCreateScalar, "makes")
aclScalar* aclCreateScalar(void* value, int dtype) {
  if (value == nullptr) {
    Fail(kNullPointer, "aclCreateScalar: no value");
    return nullptr;
  }
  switch (dtype) {
    case 0:
      return HandlesOf<aclScalar>().Give({true, *static_cast<float*>(value), 0});
    case 11:
      return HandlesOf<aclScalar>().Give({true, *static_cast<double*>(value), 0});
    case 9:
      return HandlesOf<aclScalar>().Give({false, 0, *static_cast<int64_t*>(value)});
    case 12:
      return HandlesOf<aclScalar>().Give({false, 0, *static_cast<bool*>(value)});
    default:
      Fail(kInvalid, "aclCreateScalar: cann_host does not know a scalar of aclDataType %d", dtype);
      return nullptr;
  }
}

int aclDestroyScalar(const aclScalar* scalar) {
  CANN_HOST_CALL(aclDestroyScalar);
  return Destroy("aclDestroyScalar", scalar);
}

}  // extern "C"
