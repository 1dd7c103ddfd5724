// The machine under cuda_on_cpu.h: runs a kernel's blocks one after another on the calling thread, each CUDA thread on
// a stack of its own. A thread runs until it reaches a collective; the next one is chosen by the seed: in order (0), at
// random (odd), or by priorities that are drawn once (even), so that some threads run ahead as far as they can.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "testing/cuda_types.h"

namespace cuda_on_cpu {

struct Site {  // in the source
  const char* file;
  int line;
};
#define CUDA_ON_CPU_SITE ::cuda_on_cpu::Site site = {__builtin_FILE(), __builtin_LINE()}

constexpr int kMaxPayload = 128;  // bytes a thread may hand to a collective

// Several threads that meet. Freed by the last that leaves.
struct Meeting {
  const char* what;
  Site site;
  uint32_t mask;     // lanes of a warp, or 0: all live threads of the block
  uint32_t arrived;  // lanes
  int threads;       // that arrived
  int leaving;
  alignas(16) unsigned char payload[32][kMaxPayload];  // by lane, of a warp's meeting
  int count;  // of a block's meeting: threads whose predicate holds
};

struct Shape {
  dim3 grid, block;
  size_t shared_bytes;
};

// Of the running CUDA thread.
struct Current {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
  int lane;
  void* dynamic_shared;
  size_t dynamic_bytes;
};
extern Current current;

// Runs call(arguments) once per thread of the grid; throws std::runtime_error when threads wait for each other for
// good.
void run_grid(const char* kernel, const Shape& shape, void (*call)(const void*),
              const void* arguments);

// Order of the threads and blocks of every later launch.
void set_seed(uint64_t seed);

// Waits until the lanes in `mask` have called the same collective with the same mask, each with its payload.
const Meeting* meet_warp(const char* what, uint32_t mask, const void* payload, size_t bytes,
                         Site site);
// Waits until all live threads of the block have called it.
const Meeting* meet_block(const char* what, bool predicate, Site site);
// Waits until `threads` threads have called it with the same id: bar.sync id, threads.
void meet_named(int id, int threads, Site site);
// As meet_named, without waiting: bar.arrive.
void arrive_named(int id, int threads, Site site);
// To be called once what the meeting holds has been read.
void leave(const Meeting* meeting);

// Lets other threads run.
void yield();
// Lets all others run that can, whatever the order of the threads: for a loop that waits for one of them.
void give_way();
// Ends the launch, which throws.
[[noreturn]] void fail(const char* what, Site site);

}  // namespace cuda_on_cpu
