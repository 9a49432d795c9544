// Registers what libtorch_cuda registers, and one key that torch_npu has not.
#include <string>
#include <unordered_set>

namespace c10::CachingAllocator {
struct AcceleratorAllocatorConfig {
  static std::unordered_set<std::string>& getMutableKeys();
};
}  // namespace c10::CachingAllocator

static bool registered = [] {
  for (auto key :
       {"pinned_reserve_segment_size_mb", "per_process_memory_fraction", "of_cuda_alone"})
    c10::CachingAllocator::AcceleratorAllocatorConfig::getMutableKeys().insert(key);
  return true;
}();

extern "C" int has(const char* key) {
  return c10::CachingAllocator::AcceleratorAllocatorConfig::getMutableKeys().count(key);
}
