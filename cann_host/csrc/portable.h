// Put before every source of cann_host (CMakeLists.txt): functions that glibc 2.34 moved into libc
// are asked for under the version they had before, so that a library built on a new system loads on
// an old one. Both versions do the same. tests/project/test_wheel.py fails if one is missing here.
#pragma once

#include <features.h>

#if defined(__GLIBC__) && __GLIBC_PREREQ(2, 34)
#if defined(__x86_64__)
#define CANN_HOST_OLDEST "GLIBC_2.2.5"
#define CANN_HOST_OLDEST_DLADDR1 "GLIBC_2.3.3"
#elif defined(__aarch64__)
#define CANN_HOST_OLDEST "GLIBC_2.17"
#define CANN_HOST_OLDEST_DLADDR1 "GLIBC_2.17"
#endif
#endif

#ifdef CANN_HOST_OLDEST
__asm__(".symver dladdr1,dladdr1@" CANN_HOST_OLDEST_DLADDR1);
__asm__(".symver dlopen,dlopen@" CANN_HOST_OLDEST);
__asm__(".symver dlsym,dlsym@" CANN_HOST_OLDEST);
__asm__(".symver pthread_mutex_trylock,pthread_mutex_trylock@" CANN_HOST_OLDEST);
#endif
