// Stacks to switch between, for cuda_fibers.cpp. Known to AddressSanitizer.
#pragma once

#include <stddef.h>

namespace cuda_on_cpu {

// A point of execution on a stack of its own.
class Stack {
 public:
  Stack();
  ~Stack();
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  // The next enter() begins entry() on an empty stack, whatever was on it.
  void reset(void (*entry)());
  // Called from the thread's own stack: runs until the code on this one calls exit().
  void enter();
  // Called on this stack: goes back to where enter() was called. `last` if it is not entered again.
  void exit(bool last);
  // Called first by what enter() begins.
  void begun();

 private:
  struct Context;
  Context* context_;
};

}  // namespace cuda_on_cpu
