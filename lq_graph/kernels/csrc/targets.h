// LQ_TARGET(name) for each instruction set that CMakeLists.txt compiles, the best one first. There is no
// include guard: dispatch.cpp includes this several times.
#ifdef LQ_HAS_neon_i8mm
LQ_TARGET(neon_i8mm)
#endif
#ifdef LQ_HAS_neon_dot
LQ_TARGET(neon_dot)
#endif
#ifdef LQ_HAS_amx
LQ_TARGET(amx)
#endif
#ifdef LQ_HAS_avx512vnni
LQ_TARGET(avx512vnni)
#endif
#ifdef LQ_HAS_avxvnni
LQ_TARGET(avxvnni)
#endif
#ifdef LQ_HAS_avx2
LQ_TARGET(avx2)
#endif
