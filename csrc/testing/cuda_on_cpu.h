// CUDA's language for a C++ compiler: enough of it to run the kernels of csrc/cuda/*_kernel.cuh on a CPU, for their
// tests.
//
//   cuda_on_cpu::launch<kernel>(grid, block, shared_bytes, arguments...)
//
// runs a grid to its end (cuda_fibers.h says how). Collectives are checked: every lane named in the mask, or every live
// thread of the block, must arrive at the same call, else launch() throws and says who waits where. Shared memory is
// full of 0xFF (NaN) when a block begins. Atomics give way to other threads. What one thread does between two
// collectives nobody interrupts; a spinning wait for another thread never ends; multiplications and additions are not
// fused.
//
// A collective of another kind (a matrix instruction, say) consists of lanes(): what each lane of the warp hands in.
#pragma once

#include <tuple>
#include <type_traits>
#include <utility>

#include "testing/cuda_fibers.h"

#define __global__ inline
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __constant__ static const
#define __grid_constant__
// One block runs at a time, so a block's variables are those of the process. Being of the calling thread tells them
// from all others: cuda_fibers.cpp fills every thread_local variable of the library, and restores it after the launch.
#define __shared__ static thread_local

#define GSF_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(::cuda_on_cpu::current.dynamic_shared)

inline const uint3& threadIdx = cuda_on_cpu::current.thread;
inline const uint3& blockIdx = cuda_on_cpu::current.block;
inline const dim3& blockDim = cuda_on_cpu::current.block_dim;
inline const dim3& gridDim = cuda_on_cpu::current.grid_dim;
constexpr int warpSize = 32;

namespace cuda_on_cpu {

template <class... P>
void launch_named(const char* name, void (*kernel)(P...), dim3 grid, dim3 block,
                  size_t shared_bytes, std::decay_t<P>... arguments) {
  const auto call = [&] { kernel(arguments...); };
  run_grid(
      name, {grid, block, shared_bytes},
      [](const void* closure) { (*static_cast<decltype(&call)>(closure))(); }, &call);
}

template <auto kKernel, class... A>
void launch(dim3 grid, dim3 block, size_t shared_bytes, A&&... arguments) {
  launch_named(__PRETTY_FUNCTION__, kKernel, grid, block, shared_bytes,
               std::forward<A>(arguments)...);
}

template <class T>
struct Lanes {
  T of[32];  // by lane; only the lanes of the mask are set
};

// What every lane named in `mask` hands in, for each of them.
template <class T>
Lanes<T> lanes(const char* what, uint32_t mask, const T& value, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= kMaxPayload, "not a payload");
  const Meeting* meeting = meet_warp(what, mask, &value, sizeof(T), site);
  Lanes<T> result;
  for (int l = 0; l < 32; ++l) memcpy(&result.of[l], meeting->payload[l], sizeof(T));
  leave(meeting);
  return result;
}

template <class T>
T shuffle(const char* what, uint32_t mask, const T& value, int from, Site site) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "not a type of shuffles");
  const Lanes<T> all = lanes(what, mask, value, site);
  if (!(mask >> from & 1)) fail("a shuffle reads a lane outside its mask", site);
  return all.of[from];
}

template <class T, class Combine>
T reduce(const char* what, uint32_t mask, T value, Combine combine, Site site) {
  const Lanes<T> all = lanes(what, mask, value, site);
  bool first = true;
  for (int l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    value = first ? all.of[l] : combine(value, all.of[l]);
    first = false;
  }
  return value;
}

inline uint32_t ballot(const char* what, uint32_t mask, bool predicate, Site site) {
  const Lanes<bool> all = lanes(what, mask, predicate, site);
  uint32_t result = 0;
  for (int l = 0; l < 32; ++l) result |= (mask >> l & 1) && all.of[l] ? 1u << l : 0;
  return result;
}

inline int vote(const char* what, bool predicate, Site site) {
  const Meeting* meeting = meet_block(what, predicate, site);
  const int count = meeting->count;
  leave(meeting);
  return count;
}

template <class T, class Change>
T atomic(T* at, Change change) {
  yield();
  const T old = *at;
  *at = change(old);
  return old;
}

}  // namespace cuda_on_cpu

// ---- collectives

inline void __syncthreads(CUDA_ON_CPU_SITE) { cuda_on_cpu::vote("__syncthreads", false, site); }
inline int __syncthreads_count(int p, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::vote("__syncthreads_count", p != 0, site);
}
inline int __syncthreads_or(int p, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::vote("__syncthreads_or", p != 0, site) > 0;
}
inline int __syncthreads_and(int p, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::vote("__syncthreads_and", p == 0, site) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffff, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::lanes("__syncwarp", mask, false, site);
}

inline unsigned __ballot_sync(unsigned mask, int p, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::ballot("__ballot_sync", mask, p != 0, site);
}
inline int __any_sync(unsigned mask, int p, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::ballot("__any_sync", mask, p != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int p, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::ballot("__all_sync", mask, p != 0, site) == mask;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, CUDA_ON_CPU_SITE) {
  const auto all = cuda_on_cpu::lanes("__match_any_sync", mask, value, site);
  unsigned result = 0;
  for (int l = 0; l < 32; ++l) result |= (mask >> l & 1) && all.of[l] == value ? 1u << l : 0;
  return result;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, CUDA_ON_CPU_SITE) {
  const int base = cuda_on_cpu::current.lane & ~(width - 1);
  return cuda_on_cpu::shuffle("__shfl_sync", mask, value, base + (from & (width - 1)), site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  const int lane = cuda_on_cpu::current.lane, from = lane - static_cast<int>(delta);
  return cuda_on_cpu::shuffle("__shfl_up_sync", mask, value,
                              from < (lane & ~(width - 1)) ? lane : from, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  const int lane = cuda_on_cpu::current.lane, from = lane + static_cast<int>(delta);
  return cuda_on_cpu::shuffle("__shfl_down_sync", mask, value,
                              from > (lane | (width - 1)) ? lane : from, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, CUDA_ON_CPU_SITE) {
  const int lane = cuda_on_cpu::current.lane, from = lane ^ bits;
  return cuda_on_cpu::shuffle("__shfl_xor_sync", mask, value,
                              from > (lane | (width - 1)) ? lane : from, site);
}

#define CUDA_ON_CPU_REDUCE(name, type, expression)                                  \
  inline type __reduce_##name##_sync(unsigned mask, type value, CUDA_ON_CPU_SITE) { \
    return cuda_on_cpu::reduce(                                                     \
        "__reduce_" #name "_sync", mask, value,                                     \
        [](type a, type b) { return static_cast<type>(expression); }, site);        \
  }
CUDA_ON_CPU_REDUCE(add, unsigned, a + b)
CUDA_ON_CPU_REDUCE(add, int, static_cast<unsigned>(a) + static_cast<unsigned>(b))
CUDA_ON_CPU_REDUCE(min, unsigned, a < b ? a : b)
CUDA_ON_CPU_REDUCE(min, int, a < b ? a : b)
CUDA_ON_CPU_REDUCE(max, unsigned, a > b ? a : b)
CUDA_ON_CPU_REDUCE(max, int, a > b ? a : b)
CUDA_ON_CPU_REDUCE(and, unsigned, a& b)
CUDA_ON_CPU_REDUCE(or, unsigned, a | b)
CUDA_ON_CPU_REDUCE(xor, unsigned, a ^ b)
#undef CUDA_ON_CPU_REDUCE

// ---- atomics, of the types that CUDA has them for

#define CUDA_ON_CPU_ATOMIC(name, type, expression)                                           \
  inline type atomic##name(type* at, type v) {                                               \
    return cuda_on_cpu::atomic(at, [v](type old) { return static_cast<type>(expression); }); \
  }
#define CUDA_ON_CPU_ATOMICS(type)                  \
  CUDA_ON_CPU_ATOMIC(Min, type, old < v ? old : v) \
  CUDA_ON_CPU_ATOMIC(Max, type, old > v ? old : v) \
  CUDA_ON_CPU_ATOMIC(And, type, old& v)            \
  CUDA_ON_CPU_ATOMIC(Or, type, old | v)            \
  CUDA_ON_CPU_ATOMIC(Xor, type, old ^ v)
CUDA_ON_CPU_ATOMICS(int)
CUDA_ON_CPU_ATOMICS(unsigned)
CUDA_ON_CPU_ATOMICS(long long)
CUDA_ON_CPU_ATOMICS(unsigned long long)
CUDA_ON_CPU_ATOMIC(Add, int, static_cast<unsigned>(old) + static_cast<unsigned>(v))
CUDA_ON_CPU_ATOMIC(Add, unsigned, old + v)
CUDA_ON_CPU_ATOMIC(Add, unsigned long long, old + v)
CUDA_ON_CPU_ATOMIC(Sub, int, static_cast<unsigned>(old) - static_cast<unsigned>(v))
CUDA_ON_CPU_ATOMIC(Sub, unsigned, old - v)
CUDA_ON_CPU_ATOMIC(Inc, unsigned, old >= v ? 0 : old + 1)
CUDA_ON_CPU_ATOMIC(Exch, int, (static_cast<void>(old), v))
CUDA_ON_CPU_ATOMIC(Exch, unsigned, (static_cast<void>(old), v))
CUDA_ON_CPU_ATOMIC(Exch, unsigned long long, (static_cast<void>(old), v))
#undef CUDA_ON_CPU_ATOMICS
#undef CUDA_ON_CPU_ATOMIC

#define CUDA_ON_CPU_CAS(type)                                                            \
  inline type atomicCAS(type* at, type expected, type v) {                               \
    return cuda_on_cpu::atomic(at, [=](type old) { return old == expected ? v : old; }); \
  }
CUDA_ON_CPU_CAS(int)
CUDA_ON_CPU_CAS(unsigned)
CUDA_ON_CPU_CAS(unsigned long long)
#undef CUDA_ON_CPU_CAS

inline void __threadfence() { cuda_on_cpu::yield(); }
inline void __threadfence_block() { cuda_on_cpu::yield(); }

#include "testing/cuda_intrinsics.h"
