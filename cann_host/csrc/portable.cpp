// Symbols that headers of a new compiler or glibc need and libraries of an old system lack, defined for
// this library alone. See also portable.h.
#include <features.h>

#include <new>

#ifdef __GLIBC__

// glibc 2.32 has a variable that lets shared_ptr count without atomic instructions while there is
// one thread. Zero says there may be more, which is always safe, and true in a torch process.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;

#endif

#ifdef __GLIBCXX__

// GCC 11's libstdc++ has a function that containers call when a size overflows. It is defined by its
// linker name: the headers declare it already.
extern "C" [[noreturn]] __attribute__((visibility("hidden"))) void
cann_host_bad_array_new_length() __asm__("_ZSt28__throw_bad_array_new_lengthv");
void cann_host_bad_array_new_length() { throw std::bad_array_new_length(); }

#endif
