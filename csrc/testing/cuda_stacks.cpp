#include "testing/cuda_stacks.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

#if !defined(__x86_64__)
#define CUDA_ON_CPU_UCONTEXT  // swapcontext() makes a system call
#endif
#ifdef CUDA_ON_CPU_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 256 << 10;  // its frames are larger
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

#ifdef CUDA_ON_CPU_UCONTEXT
using Point = ucontext_t;
void switch_to(Point* here, Point* there) { swapcontext(here, there); }
#else
using Point = void*;
// Pushes what a call preserves, exchanges the stack pointers, pops, and returns to the other's caller.
__attribute__((naked, noinline)) void switch_to(Point*, Point*) {
  asm volatile(
      "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq (%rsi), %rsp\n"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp\n"
      "ret\n");
}
#endif

}  // namespace

struct Stack::Context {
  char* memory;  // a page that faults, then the stack
  size_t guard;
  Point inside, outside;
  void* fake = nullptr;          // AddressSanitizer's, of this stack while it is left
  void* outside_fake = nullptr;  // and of the other
  const void* outside_bottom = nullptr;
  size_t outside_size = 0;

  char* bottom() const { return memory + guard; }
};

Stack::Stack() : context_(new Context) {
  context_->guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, context_->guard + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, context_->guard, PROT_NONE) != 0) {
    throw std::bad_alloc();
  }
  context_->memory = static_cast<char*>(memory);
}

Stack::~Stack() {
  munmap(context_->memory, context_->guard + kStackBytes);
  delete context_;
}

void Stack::reset(void (*entry)()) {
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(context_->bottom(), kStackBytes);
  context_->fake = nullptr;
#endif
#ifdef CUDA_ON_CPU_UCONTEXT
  getcontext(&context_->inside);
  context_->inside.uc_stack.ss_sp = context_->bottom();
  context_->inside.uc_stack.ss_size = kStackBytes;
  context_->inside.uc_link = nullptr;
  makecontext(&context_->inside, entry, 0);
#else
  // As a call would leave it: a return address (0: none) at 8 modulo 16. Below it, what switch_to() pops.
  void** top = reinterpret_cast<void**>(context_->bottom() + kStackBytes);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
  context_->inside = top - 8;
#endif
}

void Stack::enter() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&context_->outside_fake, context_->bottom(), kStackBytes);
#endif
  switch_to(&context_->outside, &context_->inside);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(context_->outside_fake, nullptr, nullptr);
#endif
}

void Stack::exit(bool last) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(last ? nullptr : &context_->fake, context_->outside_bottom,
                                 context_->outside_size);
#else
  static_cast<void>(last);
#endif
  switch_to(&context_->inside, &context_->outside);
  begun();
}

void Stack::begun() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(context_->fake, &context_->outside_bottom,
                                  &context_->outside_size);
#endif
}

}  // namespace cuda_on_cpu
