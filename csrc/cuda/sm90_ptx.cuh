// The instructions of compute capability 9.0a that CUDA C++ has no word for: wgmma, tensor copies, mbarriers.
//
// Addresses are 32-bit addresses of the shared window (shared_address). A CTA's own shared::cta address is also its
// shared::cluster address, so the copies need no other form of it.
#pragma once

#include <type_traits>

#include "cuda/device.cuh"

#ifdef __CUDACC__
#include <cuda.h>
#else
#include "testing/sm90_on_cpu.h"
#endif

namespace gemmascope_fast {
inline namespace on_cuda {
namespace sm90 {

// A K-major operand under the 128-byte swizzle: rows of 128 bytes, 8 rows to an atom of 1024 bytes on a 1024-byte
// boundary. Bits 0-13: address / 16; 16-29: leading offset / 16, not used with a swizzle; 32-45: bytes from atom to
// atom / 16; 49-51: base offset, 0 as atoms are aligned; 62-63: 1 = 128-byte swizzle. Columns 16 further on, within the
// 128 bytes, begin 32 bytes further on: the hardware swizzles the address bits, so the descriptor grows by 2.
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  constexpr uint64_t kFixed =
      (uint64_t{1} << 62) | (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 16);
  return kFixed | ((address & 0x3FFFF) >> 4);
}

#ifdef __CUDACC__

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ unsigned char sm90_dynamic_shared[];
  return sm90_dynamic_shared;
}

// ---- Registers

// Both are executed by all four warps of a warpgroup.
template <int kRegisters>
__device__ __forceinline__ void registers_grow() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void registers_shrink() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- mbarrier

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After the inits and before the __syncthreads() that lets others use them.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives once, and makes the phase wait for `bytes` that copies bring.
__device__ __forceinline__ void barrier_arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Returns once the phase of this parity is complete. A new barrier is in phase 0, and phase -1, of parity 1, is
// complete.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.b32 %0, 1, 0, complete;\n"
        "}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (done == 0);
}

// ---- Tensor copies, global to shared; `column` and `row` are the box's first element, in elements. What lies outside
// the tensor arrives as zeros and counts as bytes.

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void copy_box(const CUtensorMap* map, uint32_t to, uint32_t barrier,
                                         int32_t column, int32_t row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

// ---- wgmma, of operands that descriptor() describes

// Before the first product, and wherever registers of the accumulator have been touched since.
__device__ __forceinline__ void product_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void product_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most kPending committed groups of this warp are in flight.
template <int kPending>
__device__ __forceinline__ void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// acc [64 x 256] = A [64 x 16] B^T [256 x 16] (+ acc where `accumulate`). Warp w of the warpgroup holds rows 16 w .. 16
// w + 15; acc[j] is the m16n8 block of columns 8 j .. 8 j + 7: [0], [1] in row lane / 4 at columns 2 (lane % 4) and the
// next, [2], [3] the same in row lane / 4 + 8.
#define GSF_ACC(j) \
  GSF_REGISTER(acc[j][0]), GSF_REGISTER(acc[j][1]), GSF_REGISTER(acc[j][2]), GSF_REGISTER(acc[j][3])
#define GSF_PRODUCT(INSTRUCTION, SIGNS)                                                            \
  asm volatile(                                                                                    \
      "{\n"                                                                                        \
      ".reg .pred accumulate;\n"                                                                   \
      "setp.ne.b32 accumulate, %130, 0;\n"                                                         \
      "wgmma.mma_async.sync.aligned.m64n256k" INSTRUCTION                                          \
      " {"                                                                                         \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                     \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "           \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "           \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "           \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "           \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "           \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "     \
      "%111, "                                                                                     \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, " \
      "%127}, "                                                                                    \
      "%128, %129, accumulate" SIGNS                                                               \
      ";\n"                                                                                        \
      "}"                                                                                          \
      : GSF_ACC(0), GSF_ACC(1), GSF_ACC(2), GSF_ACC(3), GSF_ACC(4), GSF_ACC(5), GSF_ACC(6),        \
        GSF_ACC(7), GSF_ACC(8), GSF_ACC(9), GSF_ACC(10), GSF_ACC(11), GSF_ACC(12), GSF_ACC(13),    \
        GSF_ACC(14), GSF_ACC(15), GSF_ACC(16), GSF_ACC(17), GSF_ACC(18), GSF_ACC(19), GSF_ACC(20), \
        GSF_ACC(21), GSF_ACC(22), GSF_ACC(23), GSF_ACC(24), GSF_ACC(25), GSF_ACC(26), GSF_ACC(27), \
        GSF_ACC(28), GSF_ACC(29), GSF_ACC(30), GSF_ACC(31)                                         \
      : "l"(a), "l"(b), "r"(accumulate))

template <typename T>
__device__ __forceinline__ void product(float (&acc)[32][4], uint64_t a, uint64_t b,
                                        int32_t accumulate) {
#define GSF_REGISTER(element) "+f"(element)
  if constexpr (std::is_same_v<T, __half>) {
    GSF_PRODUCT("16.f32.f16.f16", ", 1, 1, 0, 0");
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    GSF_PRODUCT("16.f32.bf16.bf16", ", 1, 1, 0, 0");
  }
#undef GSF_REGISTER
}

// The same of bytes, A [64 x 32] and B [256 x 32]: exact.
template <typename T>
__device__ __forceinline__ void product(int32_t (&acc)[32][4], uint64_t a, uint64_t b,
                                        int32_t accumulate) {
  static_assert(std::is_same_v<T, int8_t>);
#define GSF_REGISTER(element) "+r"(element)
  GSF_PRODUCT("32.s32.s8.s8", "");
#undef GSF_REGISTER
}

#undef GSF_PRODUCT
#undef GSF_ACC

// Keeps the compiler from moving a use of the accumulator across: the products write it behind the compiler's back.
__device__ __forceinline__ void pin(float (&acc)[32][4]) {
#pragma unroll
  for (int j = 0; j < 32; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(acc[j][i])::"memory");
  }
}
__device__ __forceinline__ void pin(int32_t (&acc)[32][4]) {
#pragma unroll
  for (int j = 0; j < 32; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(acc[j][i])::"memory");
  }
}

#endif

}  // namespace sm90
}  // namespace on_cuda
}  // namespace gemmascope_fast
