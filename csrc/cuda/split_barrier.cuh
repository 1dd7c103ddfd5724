// A barrier of the block's warps whose arrival and wait lie apart (mbarrier, sm_80): between them a warp goes on.
//
// Each warp arrives once per phase, by one lane, after all of its lanes have waited for the phase before; what that lane
// wrote until then is seen by whoever has waited. Phase k has parity k % 2.
#pragma once

#include "cuda/device.cuh"

namespace gemmascope_fast {

#ifdef __CUDACC__

__device__ inline uint32_t split_barrier_address(const uint64_t* barrier) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
}

// By one thread, before a barrier of the whole block.
__device__ inline void split_barrier_init(uint64_t* barrier, uint32_t warps) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(split_barrier_address(barrier)),
               "r"(warps)
               : "memory");
}

__device__ inline void split_barrier_arrive(uint64_t* barrier) {
  asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(
                   split_barrier_address(barrier))
               : "memory");
}

__device__ inline void split_barrier_wait(const uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  do {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    asm volatile(
        "{.reg .pred done; mbarrier.test_wait.parity.shared.b64 done, [%1], %2; selp.b32 %0, 1, 0, "
        "done;}"
        : "=r"(done)
        : "r"(split_barrier_address(barrier)), "r"(parity)
        : "memory");
#else
    asm volatile(
        "{.reg .pred done; mbarrier.try_wait.parity.shared.b64 done, [%1], %2; selp.b32 %0, 1, 0, "
        "done;}"
        : "=r"(done)
        : "r"(split_barrier_address(barrier)), "r"(parity)
        : "memory");
#endif
  } while (done == 0);
}

#else

struct SplitBarrier {
  uint16_t warps, missing, parity, unused;
};
static_assert(sizeof(SplitBarrier) == sizeof(uint64_t));

inline SplitBarrier& split_barrier_at(uint64_t* barrier) {
  return *reinterpret_cast<SplitBarrier*>(barrier);
}

inline void split_barrier_init(uint64_t* barrier, uint32_t warps) {
  const uint16_t count = static_cast<uint16_t>(warps);
  split_barrier_at(barrier) = {count, count, 0, 0};
}

inline void split_barrier_arrive(uint64_t* barrier) {
  SplitBarrier& b = split_barrier_at(barrier);
  if (--b.missing > 0) return;
  b.missing = b.warps;
  b.parity ^= 1;
}

inline void split_barrier_wait(uint64_t* barrier, uint32_t parity, CUDA_ON_CPU_SITE) {
  for (int tries = 0; split_barrier_at(barrier).parity == parity; ++tries) {
    if (tries > 20000) cuda_on_cpu::fail("waits for a barrier for good", site);
    cuda_on_cpu::give_way();
  }
}

#endif

}  // namespace gemmascope_fast
