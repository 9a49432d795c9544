// Lets torch_npu be imported beside a torch whose CUDA half registers keys with the same names.
//
// c10 keeps the names of the allocator settings that backends register in one set. Registering a name
// twice throws from a static initializer, which ends the process. Python gives the address of the set
// (allocator_keys.py), so this needs no header of torch and works with all its versions.
#include <algorithm>
#include <string>
#include <unordered_set>
#include <vector>

#include "bindings.h"

namespace {

using Keys = std::unordered_set<std::string>;

Keys& Aside() {
  static Keys* keys = new Keys;
  return *keys;
}

}  // namespace

extern "C" {

// Takes every key out of the set, until cann_host_put_keys_back.
void cann_host_set_keys_aside(void* keys) { Aside().merge(*static_cast<Keys*>(keys)); }

// Puts the keys back beside the keys that were added meanwhile. Returns the keys that are in both,
// sorted and joined by ", ": with any of them, the process would have ended.
const char* cann_host_put_keys_back(void* keys) {
  static std::string* text = new std::string;
  text->clear();
  Keys& aside = Aside();
  static_cast<Keys*>(keys)->merge(aside);  // keys that are in both stay behind
  std::vector<std::string> both(aside.begin(), aside.end());
  aside.clear();
  std::sort(both.begin(), both.end());
  for (const auto& key : both) *text += (text->empty() ? "" : ", ") + key;
  return text->c_str();
}

}  // extern "C"
