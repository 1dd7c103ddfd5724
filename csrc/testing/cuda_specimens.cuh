// Kernels, right and wrong, that test the emulation itself.
#pragma once

#include "cuda/device.cuh"

namespace cuda_on_cpu {

constexpr unsigned kAll = 0xffffffff;
constexpr int kThreads = 96;

// Each block reverses its slice, by way of shared memory.
template <bool kStatic, bool kBarrier>
__global__ void __launch_bounds__(kThreads) reverse_kernel(const int* in, int* out) {
  __shared__ int fixed[kThreads];
  GSF_DYNAMIC_SHARED(int, dynamic);
  int* slice = kStatic ? fixed : dynamic;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads;
  slice[threadIdx.x] = in[at + threadIdx.x];
  if (kBarrier) __syncthreads();
  out[at + threadIdx.x] = slice[kThreads - 1 - threadIdx.x];
}

// The sum of each block's slice, for every thread. The second barrier keeps a warp that is ahead from overwriting what
// another has yet to read.
template <bool kBarrier>
__global__ void __launch_bounds__(kThreads)
    running_sums_kernel(const int* in, int* out, int rounds) {
  __shared__ int warps[kThreads / 32];
  int total = 0;
  for (int r = 0; r < rounds; ++r) {
    int sum = in[r * kThreads + static_cast<int>(threadIdx.x)];
    for (int bit = 16; bit > 0; bit /= 2) sum += __shfl_xor_sync(kAll, sum, bit);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
    __syncthreads();
    for (int w = 0; w < kThreads / 32; ++w) total += warps[w];
    if (kBarrier) __syncthreads();
  }
  out[threadIdx.x] = total;
}

// What shared memory holds before anything is written.
__global__ void __launch_bounds__(kThreads) unwritten_kernel(unsigned* out) {
  __shared__ unsigned fixed[kThreads];
  GSF_DYNAMIC_SHARED(unsigned, dynamic);
  out[threadIdx.x] = fixed[threadIdx.x] & dynamic[threadIdx.x];
  fixed[threadIdx.x] = dynamic[threadIdx.x] = 0;
}

// A counter that is read and written apart.
__global__ void __launch_bounds__(kThreads) lost_update_kernel(int* count) {
  const int seen = *count;
  __syncwarp();
  *count = seen + 1;
}

__global__ void __launch_bounds__(kThreads) claim_kernel(unsigned* next, unsigned* order) {
  order[atomicAdd(next, 1u)] = threadIdx.x;
}

enum class Wrong : int {
  kLaneSkips,
  kLaneEnded,
  kOtherCollective,
  kOtherMask,
  kNotNamed,
  kBarrierSkipped,
  kTwoBarriers,
  kBarrierAgainstWarp,
  kNamedBarrier,
  kTrap,
  kOutside,
};

__global__ void __launch_bounds__(kThreads) wrong_kernel(Wrong wrong, int* out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool odd = lane % 2 == 1;
  switch (wrong) {
    case Wrong::kLaneSkips:
      if (lane != 7) out[lane] = __shfl_sync(kAll, lane, 0);
      __syncthreads();
      break;
    case Wrong::kLaneEnded:
      if (lane == 7) return;
      out[lane] = __any_sync(kAll, lane);
      break;
    case Wrong::kOtherCollective:
      out[lane] = odd ? __any_sync(kAll, lane) : static_cast<int>(__ballot_sync(kAll, lane));
      break;
    case Wrong::kOtherMask:
      out[lane] = __shfl_sync(odd ? kAll : 0x55555555, lane, 0);
      break;
    case Wrong::kNotNamed:
      __syncwarp(0x55555555);
      break;
    case Wrong::kBarrierSkipped:
      if (threadIdx.x >= 32) __syncthreads();
      __syncwarp();
      __syncthreads();
      break;
    case Wrong::kTwoBarriers:
      if (threadIdx.x < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case Wrong::kBarrierAgainstWarp:
      if (odd) {
        __syncthreads();
      } else {
        __syncwarp();
      }
      break;
    case Wrong::kNamedBarrier:
      meet_named(1, kThreads + 32, {__FILE__, __LINE__});
      break;
    case Wrong::kTrap:
      __trap();
      break;
    case Wrong::kOutside:
      out[lane] = odd ? __shfl_sync(0xaaaaaaaa, lane, 0) : 0;
      break;
  }
}

// Named barriers: the first warp's threads leave work for the others, which leave it for the first.
__global__ void __launch_bounds__(kThreads) hand_over_kernel(int* out) {
  __shared__ int box[kThreads];
  const int t = static_cast<int>(threadIdx.x);
  const Site here = {__FILE__, __LINE__};
  if (t < 32) {
    box[t] = t * t;
    arrive_named(3, kThreads, here);
    meet_named(4, kThreads, here);
    out[t] = box[t + 32] + box[t + 64];
  } else {
    meet_named(3, kThreads, here);
    box[t] = box[t % 32] * (t / 32);
    arrive_named(4, kThreads, here);
  }
}

// Every collective of a warp, by lane.
__global__ void __launch_bounds__(32) collectives_kernel(const unsigned* in, int64_t* out) {
  const unsigned v = in[threadIdx.x];
  const unsigned lane = threadIdx.x;
  int64_t* row = out + lane;
  const auto put = [&](auto value) {
    *row = static_cast<int64_t>(value);
    row += 32;
  };
  put(__shfl_sync(kAll, v, 5));
  put(__shfl_sync(kAll, v, static_cast<int>(lane) + 3, 8));
  put(__shfl_up_sync(kAll, v, 3));
  put(__shfl_up_sync(kAll, v, 3, 16));
  put(__shfl_down_sync(kAll, v, 9));
  put(__shfl_down_sync(kAll, static_cast<uint64_t>(v) << 20, 1, 4));
  put(__shfl_xor_sync(kAll, v, 21));
  put(__shfl_xor_sync(kAll, __uint_as_float(v % 1000), 1) == __uint_as_float(in[lane ^ 1] % 1000));
  put(__ballot_sync(kAll, v & 1));
  put(__any_sync(kAll, v % 61 == 0));
  put(__all_sync(kAll, v != 0));
  put(__match_any_sync(kAll, v % 5));
  put(__reduce_add_sync(kAll, v));
  put(__reduce_min_sync(kAll, v));
  put(__reduce_max_sync(kAll, static_cast<int>(v)));
  put(__reduce_or_sync(kAll, v));
  put(__reduce_and_sync(kAll, v | 0xff));
  put(__syncthreads_count(v & 1));
  put(__syncthreads_or(v == in[3]));
  put(__syncthreads_and(v == in[3]));
  if (lane % 2 == 1) {  // half of the warp
    put(__reduce_add_sync(0xaaaaaaaa, v));
  } else {
    put(__reduce_xor_sync(0x55555555, v));
  }
}

__global__ void __launch_bounds__(32) atomics_kernel(const int* in, int* out) {
  const int v = in[blockIdx.x * 32 + threadIdx.x];
  const unsigned u = static_cast<unsigned>(v);
  unsigned* at = reinterpret_cast<unsigned*>(out);
  atomicAdd(out + 0, v);
  atomicMin(out + 1, v);
  atomicMax(out + 2, v);
  atomicMin(at + 3, u);
  atomicMax(at + 4, u);
  atomicOr(at + 5, u);
  atomicAnd(at + 6, u);
  atomicXor(at + 7, u);
  int seen = out[8];
  while (true) {  // a sum by compare and swap
    const int old = atomicCAS(out + 8, seen, seen + v);
    if (old == seen) break;
    seen = old;
  }
  atomicAdd(reinterpret_cast<unsigned long long*>(out + 10), static_cast<unsigned long long>(u));
}

// What each thread is told about its place.
__global__ void __launch_bounds__(64) place_kernel(int* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * (blockDim.x * blockDim.y * blockDim.z) + thread] += 1;
}

}  // namespace cuda_on_cpu
