// cuda/sm90_ptx.cuh for cuda_on_cpu.h: one CTA. An address is an offset in the dynamic shared memory, whose
// begin counts as a multiple of 1024.
//
// Nothing happens before it must: a copy arrives when a thread waits for a barrier in vain, a product is computed when
// its group is waited for. A stage that is released too early, or sums that are read too early, give wrong results.
#pragma once

#include <deque>
#include <vector>

#include "testing/cuda_on_cpu.h"

// Rows of elements of `bytes` bytes; the stride is in elements. A row of the box has 128 bytes.
struct CUtensorMap {
  const void* data;
  int bytes;
  int64_t columns, rows, stride;
  int box_columns, box_rows;
};

namespace gemmascope_fast {
inline namespace on_cuda {
namespace sm90 {

inline unsigned char* dynamic_shared() {
  return static_cast<unsigned char*>(cuda_on_cpu::current.dynamic_shared);
}
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - dynamic_shared());
}

// The 128-byte swizzle: bits 4-6 of an address are changed by bits 7-9.
inline unsigned char* swizzled(uint32_t address) {
  return dynamic_shared() + (address ^ (address >> 7 & 7) << 4);
}

template <int kRegisters>
void registers_grow() {}
template <int kRegisters>
void registers_shrink() {}

// ---- mbarrier

struct Barrier {
  int32_t bytes;      // that the phase still waits for
  uint16_t arrivals;  // of a phase
  uint16_t missing : 15, parity : 1;
};
static_assert(sizeof(Barrier) == 8);

inline Barrier& barrier_at(uint32_t address) {
  return *reinterpret_cast<Barrier*>(dynamic_shared() + address);
}

inline void barrier_settle(Barrier& b) {
  if (b.missing != 0 || b.bytes != 0) return;
  b.missing = b.arrivals;
  b.parity ^= 1;
}

inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  barrier_at(barrier) = {0, static_cast<uint16_t>(arrivals), static_cast<uint16_t>(arrivals), 0};
}
inline void barrier_init_fence() {}

inline void barrier_arrive_expecting(uint32_t barrier, uint32_t bytes, CUDA_ON_CPU_SITE) {
  Barrier& b = barrier_at(barrier);
  if (b.missing == 0) cuda_on_cpu::fail("more arrivals than a phase has", site);
  b.bytes += static_cast<int32_t>(bytes);
  --b.missing;
  barrier_settle(b);
}
inline void barrier_arrive(uint32_t barrier, CUDA_ON_CPU_SITE) {
  barrier_arrive_expecting(barrier, 0, site);
}
// ---- tensor copies

struct TensorCopy {
  CUtensorMap map;
  uint32_t to, barrier;
  int32_t column, row;
};

inline std::deque<TensorCopy>& tensor_copies() {
  static std::deque<TensorCopy> copies;
  return copies;
}

inline void arrive_copy(const TensorCopy& copy) {
  const CUtensorMap& m = copy.map;
  for (int r = 0; r < m.box_rows; ++r) {
    for (int c = 0; c < m.box_columns; ++c) {
      const int64_t row = copy.row + int64_t{r}, column = copy.column + int64_t{c};
      const bool inside = row < m.rows && column < m.columns;
      const size_t bytes = static_cast<size_t>(m.bytes);
      const char* from = static_cast<const char*>(m.data) + (row * m.stride + column) * m.bytes;
      unsigned char* to =
          swizzled(copy.to + static_cast<uint32_t>(m.bytes * (r * m.box_columns + c)));
      inside ? memcpy(to, from, bytes) : memset(to, 0, bytes);
    }
  }
  Barrier& b = barrier_at(copy.barrier);
  b.bytes -= m.bytes * m.box_rows * m.box_columns;
  barrier_settle(b);
}

inline void prefetch_map(const CUtensorMap*) {}
inline void copy_box(const CUtensorMap* map, uint32_t to, uint32_t barrier, int32_t column,
                     int32_t row, CUDA_ON_CPU_SITE) {
  if (to % 1024 != 0 || map->bytes * map->box_columns != 128)
    cuda_on_cpu::fail("not a swizzled box", site);
  tensor_copies().push_back({*map, to, barrier, column, row});
}
// The last copy arrives first.
inline void barrier_wait(uint32_t barrier, uint32_t parity, CUDA_ON_CPU_SITE) {
  for (int tries = 0; barrier_at(barrier).parity == parity; ++tries) {
    if (tries > 1 && !tensor_copies().empty()) {
      const TensorCopy copy = tensor_copies().back();
      tensor_copies().pop_back();
      arrive_copy(copy);
    }
    if (tries > 20000) {
      tensor_copies().clear();
      cuda_on_cpu::fail("waits for a barrier for good", site);
    }
    cuda_on_cpu::give_way();
  }
}

// ---- wgmma

struct Product {
  void* acc;  // [32][4]
  uint64_t a, b;
  bool accumulate;
  void (*compute)(const Product&);
};

// Groups of one thread of the running block, the last of them not committed.
inline std::deque<std::vector<Product>>& product_groups() {
  static std::deque<std::vector<Product>> groups[1024];
  std::deque<std::vector<Product>>& own = groups[threadIdx.x];
  if (own.empty()) own.emplace_back();
  return own;
}

// 32 bytes of a row of the operand.
template <typename T, typename Sum>
void operand_row(uint64_t descriptor, int row, Sum (&to)[32 / sizeof(T)], CUDA_ON_CPU_SITE) {
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3FFF) << 4;
  const uint32_t atom = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4;
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) {
    cuda_on_cpu::fail("not a descriptor of an aligned 128-byte swizzle", site);
  }
  for (size_t k = 0; k < 32 / sizeof(T); ++k) {
    const uint32_t address = start + static_cast<uint32_t>(row / 8) * atom +
                             static_cast<uint32_t>(row % 8 * 128) +
                             static_cast<uint32_t>(k * sizeof(T));
    T element;
    memcpy(&element, swizzled(address), sizeof(T));
    to[k] = static_cast<Sum>(element);
  }
}

template <typename T, typename Sum>
void compute(const Product& product) {
  constexpr size_t kCount = 32 / sizeof(T);
  const int lane = cuda_on_cpu::current.lane;
  const int row = 16 * static_cast<int>(threadIdx.x / 32 % 4) + lane / 4;
  Sum(*const acc)[4] = static_cast<Sum(*)[4]>(product.acc);
  Sum rows[2][kCount], column[kCount];
  operand_row<T>(product.a, row, rows[0]);
  operand_row<T>(product.a, row + 8, rows[1]);
  for (int pair = 0; pair < 64; ++pair) {
    operand_row<T>(product.b, 8 * (pair / 2) + 2 * (lane % 4) + pair % 2, column);
    for (int half = 0; half < 2; ++half) {
      Sum& sum = acc[pair / 2][2 * half + pair % 2];
      if (!product.accumulate) sum = 0;
      for (size_t k = 0; k < kCount; ++k) sum += rows[half][k] * column[k];
    }
  }
}

// All lanes meet in the instructions of wgmma: what lane 0 does behind them, it does for the warp.
inline void product_fence(CUDA_ON_CPU_SITE) {
  cuda_on_cpu::lanes("product_fence", 0xffffffffu, false, site);
}
inline void product_commit() { product_groups().emplace_back(); }

template <int kPending>
void product_wait(CUDA_ON_CPU_SITE) {
  cuda_on_cpu::lanes("product_wait", 0xffffffffu, false, site);
  std::deque<std::vector<Product>>& groups = product_groups();
  while (groups.size() > static_cast<size_t>(kPending) + 1) {
    for (const Product& product : groups.front()) product.compute(product);
    groups.pop_front();
  }
}

template <typename T, typename Sum>
void product(Sum (&acc)[32][4], uint64_t a, uint64_t b, int32_t accumulate) {
  product_groups().back().push_back({acc, a, b, accumulate != 0, &compute<T, Sum>});
}

template <typename Sum>
void pin(Sum (&)[32][4]) {}

}  // namespace sm90
}  // namespace on_cuda
}  // namespace gemmascope_fast
