// Copies from global to shared memory that a thread starts and later waits for (cp.async, sm_80).
//
// A thread sees what it copied itself after `async_wait`; other threads see it after a barrier. Compiled for a CPU, a
// copy is done where it is started.
#pragma once

#include "cuda/device.cuh"

namespace gemmascope_fast {

// 16 bytes. `through_l1` where the other half of a 32-byte sector is read next.
__device__ inline void async_copy_16(uint4* to, const void* from, bool through_l1) {
#ifdef __CUDA_ARCH__
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if (through_l1) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
  }
#else
  (void)through_l1;
  *to = *static_cast<const uint4*>(from);
#endif
}

// Asks for a row of global memory to be brought into the L2; all threads of the block call it.
__device__ inline void fetch_row(const void* row, int64_t bytes) {
#ifdef __CUDA_ARCH__
  const char* from = static_cast<const char*>(row);
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x != blockDim.x - 32) return;
  const int64_t skip = -reinterpret_cast<intptr_t>(row) & 15;
  if (bytes < skip + 16) return;
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from + skip),
               "r"(static_cast<uint32_t>(bytes - skip) & ~15u)
               : "memory");
#else
  for (int64_t at = static_cast<int64_t>(threadIdx.x) * 64; at < bytes;
       at += static_cast<int64_t>(blockDim.x) * 64) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from + at) : "memory");
  }
#endif
#else
  (void)row;
  (void)bytes;
#endif
}

// Ends the group of copies started since the last call.
__device__ inline void async_commit() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `pending` of the newest groups are unfinished.
template <int pending>
__device__ inline void async_wait() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// The same for a number known at run time, at most 3; fewer may be left pending than asked.
__device__ inline void async_wait(int pending) {
  if (pending >= 3) {
    async_wait<3>();
  } else if (pending == 2) {
    async_wait<2>();
  } else if (pending == 1) {
    async_wait<1>();
  } else {
    async_wait<0>();
  }
}

}  // namespace gemmascope_fast
