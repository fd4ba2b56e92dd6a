// What the thread sanitiser is told of the host shim: each fiber is a thread of its own, ordered
// with others by launches, barriers, fences and __syncwarp alone. Where a build has it, it reports
// every two accesses that a GPU need not do in this order.
#pragma once

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace memtl::tests {

#if defined(__SANITIZE_THREAD__)

constexpr bool kSeesRaces = true;

// Of groups of quant: lanes that have none left write what is there already.
extern "C" [[gnu::used]] inline const char* __tsan_default_suppressions() {
  return "race:memtl::cuda::store_group\nrace:memtl::cuda::store_codes\nrace:memtl::cuda::pack_"
         "group";
}

// What is done while this lives is the shim's, not the kernel's.
struct Unseen {
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};

// What a thread did before publish() comes before what another does after observe(), of one place.
inline void publish(void* place) { __tsan_release(place); }
inline void observe(void* place) { __tsan_acquire(place); }

using Thread = void*;
inline Thread new_thread() { return __tsan_create_fiber(0); }
inline void end_thread(Thread thread) { __tsan_destroy_fiber(thread); }
inline Thread this_thread() { return __tsan_get_current_fiber(); }
inline void become(Thread thread) {
  __tsan_switch_to_fiber(thread, __tsan_switch_to_fiber_no_sync);
}

#else

constexpr bool kSeesRaces = false;

struct Unseen {
  Unseen() {}
};
inline void publish(void*) {}
inline void observe(void*) {}

struct Thread {};
inline Thread new_thread() { return {}; }
inline void end_thread(Thread) {}
inline Thread this_thread() { return {}; }
inline void become(Thread) {}

#endif

}  // namespace memtl::tests
