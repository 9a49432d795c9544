// The memory that this process has allocated, as memory.cpp keeps it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cann_host {

enum class Where : int { kHost = 0, kDevice = 1, kUnregistered = 2 };  // aclrtMemLocationType

// Counts bytes against the limit of a device; fails if they do not fit. Host memory has no limit.
int TakeBytes(const char* symbol, size_t size, Where where, int device);
void GiveBackBytes(size_t size, Where where, int device);

// Fills new device memory, if an option asks for it.
void Fill(void* bytes, size_t size, Where where);

// Memory from here on: every function finds it. A reservation is the number of the addresses that it is
// mapped to, 0 for none; neighbours in one reservation are one piece of memory.
void AddBlock(void* begin, size_t size, Where where, int device, uint64_t reservation);
void RemoveBlock(const void* begin);

}  // namespace cann_host
