// Hides a function from the dynamic linker: the version of CANN that is reported does not have it.
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

#include "bindings.h"

extern "C" {

// Makes a symbol of this library an undefined one, which no later lookup finds. Returns 0 for success.
int cann_host_hide(void* function, const char* symbol) {
  Dl_info info{};
  void* entry = nullptr;
  if (dladdr1(function, &info, &entry, RTLD_DL_SYMENT) == 0 || entry == nullptr ||
      info.dli_sname == nullptr || std::strcmp(info.dli_sname, symbol) != 0) {
    return 1;
  }
  auto* found = static_cast<ElfW(Sym)*>(entry);
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(found) & ~(page - 1);
  const auto end = (reinterpret_cast<uintptr_t>(found + 1) + page - 1) & ~(page - 1);
  auto* memory = reinterpret_cast<void*>(begin);
  if (mprotect(memory, end - begin, PROT_READ | PROT_WRITE) != 0) return 2;
  found->st_value = 0;
  found->st_shndx = SHN_UNDEF;
  return mprotect(memory, end - begin, PROT_READ) == 0 ? 0 : 3;
}

}  // extern "C"
