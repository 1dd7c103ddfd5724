// cuda/mma.cuh for cuda_on_cpu.h. A copy happens when its group is waited for, not before.
#pragma once

#include <vector>

#include "testing/cuda_on_cpu.h"

namespace gemmascope_fast {
inline namespace on_cuda {

using SharedAddress = unsigned char*;

inline SharedAddress shared_address(const void* pointer) {
  return static_cast<unsigned char*>(const_cast<void*>(pointer));
}

struct AsyncCopy {
  unsigned char* to;
  const void* from;
  bool valid;
};

// Groups of copies of one thread of the running block, the last of them not committed.
inline std::vector<std::vector<AsyncCopy>>& async_groups() {
  static std::vector<std::vector<AsyncCopy>> groups[1024];
  std::vector<std::vector<AsyncCopy>>& own = groups[threadIdx.x];
  if (own.empty()) own.emplace_back();
  return own;
}

inline void copy_async(SharedAddress to, const void* from, bool valid) {
  async_groups().back().push_back({to, from, valid});
}
inline void copy_async_commit() { async_groups().emplace_back(); }
template <int kPending>
void copy_async_wait() {
  std::vector<std::vector<AsyncCopy>>& groups = async_groups();
  while (groups.size() > static_cast<size_t>(kPending) + 1) {
    for (const AsyncCopy& copy : groups.front()) {
      if (copy.valid) {
        memcpy(copy.to, copy.from, 16);
      } else {
        memset(copy.to, 0, 16);
      }
    }
    groups.erase(groups.begin());
  }
}

inline void load_matrices(uint32_t (&m)[4], SharedAddress row, CUDA_ON_CPU_SITE) {
  const auto rows = cuda_on_cpu::lanes("load_matrices", 0xffffffffu, row, site);
  const int lane = cuda_on_cpu::current.lane;
  for (int i = 0; i < 4; ++i) memcpy(&m[i], rows.of[8 * i + lane / 4] + 4 * (lane % 4), 4);
}

struct MmaOperands {
  uint32_t a[4], b[2];
};

// Element k < 16 of a row of `a` (column of `b`): of the pair that its lane holds in registers[k / 8].
template <typename T>
float mma_element(const uint32_t* registers, int k) {
  T pair[2];
  memcpy(pair, registers + k / 8, 4);
  return static_cast<float>(pair[k % 2]);
}

template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  CUDA_ON_CPU_SITE) {
  const MmaOperands own = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const auto all = cuda_on_cpu::lanes("multiply_add", 0xffffffffu, own, site);
  const int lane = cuda_on_cpu::current.lane;
  for (int e = 0; e < 4; ++e) {
    for (int k = 0; k < 16; ++k) {
      const MmaOperands& row = all.of[lane / 4 * 4 + k % 8 / 2];
      const MmaOperands& column = all.of[(2 * (lane % 4) + e % 2) * 4 + k % 8 / 2];
      const uint32_t rows[2] = {row.a[e / 2], row.a[2 + e / 2]};
      c[e] += mma_element<T>(rows, k) * mma_element<T>(column.b, k);
    }
  }
}

inline void load_words(uint32_t (&v)[4], SharedAddress at) { memcpy(v, at, 16); }

inline float4 load_shared(SharedAddress at) {
  float4 v;
  memcpy(&v, at, 16);
  return v;
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
