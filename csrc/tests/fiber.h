// Threads that hand over to each other where they say so: the threads of a CUDA block, on one
// thread of the CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "tests/races.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace memtl::tests {

// A function call with a stack of its own. resume() runs it until it calls suspend() or returns.
class Fiber {
 public:
  static constexpr size_t kStack = 128 << 10;  // bytes; the sanitisers' frames are large

  Fiber() : stack_(std::make_unique_for_overwrite<std::byte[]>(kStack)) {}
  ~Fiber() { end_thread(thread_); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() calls entry(argument) from its start.
  void start(void (*entry)(void*), void* argument) {
    entry_ = entry;
    argument_ = argument;
    ended_ = false;
#if defined(__x86_64__)
    auto top = reinterpret_cast<uintptr_t>(stack_.get() + kStack) & ~uintptr_t{15};
    auto* slots = reinterpret_cast<void**>(top) - 8;
    for (int i = 0; i < 8; ++i) slots[i] = nullptr;     // six registers, where to go, no return
    slots[6] = reinterpret_cast<void*>(&Fiber::enter);  // finds the stack as after a call
    own_ = slots;
#else
    getcontext(&own_);
    own_.uc_stack.ss_sp = stack_.get();
    own_.uc_stack.ss_size = kStack;
    own_.uc_link = nullptr;
    makecontext(&own_, &Fiber::enter, 0);
#endif
  }

  void resume() {
    Fiber* before = current;
    current = this;
    caller_thread_ = this_thread();
    leave(&caller_fake_, stack_.get(), kStack);
    become(thread_);
    swap(caller_, own_);
    arrive(caller_fake_, nullptr, nullptr);
    current = before;
  }

  // Goes back to where resume() was called.
  static void suspend() {
    Fiber* self = current;
    leave(self->ended_ ? nullptr : &self->own_fake_, self->caller_stack_, self->caller_size_);
    become(self->caller_thread_);
    swap(self->own_, self->caller_);
    arrive(self->own_fake_, &self->caller_stack_, &self->caller_size_);
  }

  bool ended() const { return ended_; }

 private:
  static void enter() {
    Fiber* self = current;
    arrive(nullptr, &self->caller_stack_, &self->caller_size_);
    self->entry_(self->argument_);
    self->end();
    suspend();
  }

  void end() {
    const Unseen shim;
    ended_ = true;
  }

#if defined(__x86_64__)
  using Context = void*;  // a stack pointer, below which the registers are that a call preserves

  [[gnu::naked, gnu::noinline]] static void switch_stacks(void** /*from*/, void* /*to*/) {
    asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15;"
        "movq %rsp, (%rdi); movq %rsi, %rsp;"
        "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
  }
  static void swap(Context& from, Context& to) { switch_stacks(&from, to); }
#else
  using Context = ucontext_t;
  static void swap(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

  // The address sanitiser wants to know of every change of stacks.
#if defined(__SANITIZE_ADDRESS__)
  static void leave(void** fake, const void* stack, size_t size) {
    __sanitizer_start_switch_fiber(fake, stack, size);
  }
  static void arrive(void* fake, const void** stack, size_t* size) {
    __sanitizer_finish_switch_fiber(fake, stack, size);
  }
#else
  static void leave(void**, const void*, size_t) {}
  static void arrive(void*, const void**, size_t*) {}
#endif

  static inline Fiber* current = nullptr;

  std::unique_ptr<std::byte[]> stack_;
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  bool ended_ = true;
  Context own_{}, caller_{};
  Thread thread_ = new_thread(), caller_thread_{};
  void* own_fake_ = nullptr;
  void* caller_fake_ = nullptr;
  const void* caller_stack_ = nullptr;
  size_t caller_size_ = 0;
};

}  // namespace memtl::tests
