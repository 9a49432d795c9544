// The sources the library was built from, as CMakeLists.txt puts them into one word: _native.py takes
// no library whose structs and signatures may be others than Python's.
extern "C" const char* cann_host_sources() { return CANN_HOST_SOURCES; }
