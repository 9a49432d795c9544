// The functions and structs that Python and this library share, all of them: cann_host/bindings.py
// declares the same for ctypes, and a test compares the two. Every file that defines one of these
// functions includes this header, so that the compiler compares them too.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

// ---- structs, whose sizes Python compares when it loads the library ----

// A tensor that is an input of a compiled graph. Equal bytes, with equal dims, are the same tensor.
struct cann_host_ge_tensor {
  void* data;
  size_t size;  // bytes that may be read at data
  int32_t dtype;
  int32_t format;
  int32_t dim_count;         // storage shape: of the format
  int32_t origin_dim_count;  // the shape torch sees; 0 with `has_origin` 0 if it was not set
  int32_t has_origin;
  int32_t placement;
  uint64_t first_dim;  // in the dims of all inputs: the storage shape, then the shape torch sees
};

// Python only passes these two back.
struct cann_host_ge_summary;
struct cann_host_ge_outputs;

// bindings.cpp: the digest of the sources, and "struct size\n" for each struct above
const char* cann_host_sources();
const char* cann_host_struct_sizes();

// core.cpp
void cann_host_configure(const char* soc, const char* cann_version, int devices, uint64_t memory,
                         int late_streams, int fill);
void cann_host_add_fault(const char* symbol, int code, const char* text, long call);
void cann_host_drop_faults(size_t keep);
const char* cann_host_entries();
void cann_host_set_error(const char* text);
const char* cann_host_recent_error();

// memory.cpp
uint64_t cann_host_bytes_at(const void* address);
uint64_t cann_host_block_of(const void* address, uint64_t bytes);
uint64_t cann_host_prefetches();
void cann_host_count_prefetch();
uint64_t cann_host_state();

// tracked.cpp
uint64_t cann_host_track(const void* address, uint64_t bytes);
int cann_host_is_tracked(uint64_t number);
void cann_host_untrack(uint64_t number);
void cann_host_wrote(const void* address, uint64_t bytes);

// stream.cpp
int cann_host_has_task_queue();
void cann_host_leave();

// capture.cpp
int cann_host_captures(void* stream);
int cann_host_record(void* stream, int64_t number);
int64_t cann_host_next_ended();

// graph.cpp
void cann_host_ge_register_op(const char* type, const char* inputs, const char* attrs);

// ge.cpp
void cann_host_ge_fail(const char* text);
void cann_host_ge_set_static(cann_host_ge_summary* summary, int is_static);
void cann_host_ge_add_output(cann_host_ge_summary* summary, int32_t dtype, const int64_t* dims,
                             size_t dim_count);
void* cann_host_ge_output(cann_host_ge_outputs* outputs, size_t index, int32_t dtype,
                          const int64_t* dims, size_t dim_count, size_t size);

// hccl.cpp
int cann_host_hccl_run(const char* name, int kind, int dtype, int op, uint32_t root, uint64_t count,
                       const void* send, void* receive);
uint32_t cann_host_hccl_ranks(const char* name);

// allocator_keys.cpp
void cann_host_set_keys_aside(void* keys);
const char* cann_host_put_keys_back(void* keys);

// hide.cpp
int cann_host_hide(void* function, const char* symbol);

// torch_kernels.cpp
int cann_host_copy_kernel(const char* name, const char* overload, const char* new_name,
                          uint32_t key);

// ---- Python functions, each passed as the address of its object; null removes it ----

void cann_host_set_aclnn_executor(void* run);                             // aclnn_call.cpp
void cann_host_set_replay(void* replay);                                  // capture.cpp
void cann_host_set_ge_executor(void* compile, void* run, void* release);  // ge.cpp

}  // extern "C"
