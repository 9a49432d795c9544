// Copies a kernel of torch's dispatcher to another operator, for torch before 2.9, whose Python cannot
// fetch a kernel (torch.library.get_kernel). torch_kernels.cpp includes this for torch's new ABI of
// strings, torch_kernels_oldabi.cpp for the old one. The types have the layout of those versions, in
// ATen/core/dispatch/Dispatcher.h and ATen/core/boxing/KernelFunction.h; no header of torch is needed.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

namespace {

struct OperatorName {
  std::string name, overload;
};

struct KernelFunction {
  KernelFunction(const KernelFunction& other)
      : functor(other.functor), boxed(other.boxed), unboxed(other.unboxed), sym(other.sym) {
    if (functor != nullptr) ++*reinterpret_cast<uint32_t*>(functor + 1);  // of the intrusive_ptr
  }
  ~KernelFunction() {}  // the callee has moved it away

  void** functor;  // at the object: its virtual table, then its count of references
  void* boxed;
  void* unboxed;
  void* sym;
};

struct CppSignature {
  const void* type;
};

struct FunctionSchema {};

struct OperatorHandle {
  OperatorHandle(const OperatorHandle&) = delete;
  ~OperatorHandle() {}

  const void* entry;  // the OperatorEntry is the first member of what it points to
  void* iterator;
};

struct Registration {
  Registration(const Registration&) = delete;
  ~Registration() {}

  std::function<void()> undo;
};

using RealSingleton = void* (*)();
using FindSchema = std::optional<OperatorHandle> (*)(void*, const OperatorName&);
using KernelFor = const KernelFunction& (*)(const void*, uint16_t);
using RegisterImpl = Registration (*)(void*, OperatorName, std::optional<uint16_t>, KernelFunction,
                                      std::optional<CppSignature>, std::unique_ptr<FunctionSchema>,
                                      std::string);

// Returns 0; 1 if this torch has not the functions, 2 if it has not the operator.
int CopyKernel(const char* register_impl, const char* name, const char* overload,
               const char* new_name, uint16_t key) {
  void* torch = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
  if (torch == nullptr) return 1;
  const auto singleton =
      reinterpret_cast<RealSingleton>(dlsym(torch, "_ZN3c1010Dispatcher13realSingletonEv"));
  const auto find = reinterpret_cast<FindSchema>(
      dlsym(torch, "_ZN3c1010Dispatcher10findSchemaERKNS_12OperatorNameE"));
  const auto kernel = reinterpret_cast<KernelFor>(
      dlsym(torch, "_ZNK3c104impl13OperatorEntry20kernelForDispatchKeyENS_11DispatchKeyE"));
  const auto add = reinterpret_cast<RegisterImpl>(dlsym(torch, register_impl));
  if (singleton == nullptr || find == nullptr || kernel == nullptr || add == nullptr) return 1;
  void* dispatcher = singleton();
  const auto found = find(dispatcher, {name, overload});
  if (!found) return 2;
  // never undone, as the library of the kernel is never unloaded
  new Registration(add(dispatcher, {new_name, overload}, key, kernel(found->entry, key),
                       std::nullopt, nullptr, "cann_host"));
  return 0;
}

}  // namespace
