// Device code of decode, decode_ and d_x: for every token, a weighted sum of the rows of a matrix that its entries
// name.
//
//   out[i] = (out[i] +) bias + sum_s sum_e coefficients[e] gate[e] M[indices[e]]      e: entries of row s n + i
//   M [F, d], out [n, d], entry sets s = 0 .. sets - 1
//
// One warp per (token, slab of 512 bytes of columns), 16 bytes per lane, slab after slab: a slab of 65k rows is 33 MB,
// which the L2 holds, so that reuse is found there. 8 rows are in flight per warp: at 80 registers, 24 warps and 96 KB
// per multiprocessor, where 3.3 TB/s need 17 KB on the way at any time. Entries are added in stored order, one
// accumulator per column. Bound by reading nnz rows of d elements.
#pragma once

#include "cuda/rows.cuh"

namespace gemmascope_fast {

// One warp, so that the compiler sees that its lanes go the same way: it would guard every shuffle otherwise.
constexpr int kTokenThreads = kWarp;
constexpr int kTokenBlocks = kCapability == 86 ? 16 : 24;  // per multiprocessor; 8.6 has no more
constexpr int kTokenRows = 8;                              // rows in flight

struct TokenPass {
  const int64_t* offsets;     // [sets * n + 1]
  const int32_t* indices;     // [capacity]
  const float* coefficients;  // [capacity], null for zeros
  const float* gate;          // [capacity], null for ones
  int64_t n, sets, capacity;
  Rows matrix;        // [F, d]
  const float* bias;  // [d], null for zeros
  Target out;         // [n, d]
  int add;            // to what is there
};

// How a lane reads its columns of a row.
enum class Access : int {
  k16,   // 8 columns of a wide 16-bit row, one load
  k32,   // 4 columns of a wide float32 row, one load
  kAny,  // 4 columns, element by element
};

__host__ __device__ constexpr int token_columns(Access access) {
  return access == Access::k16 ? 8 : 4;
}

__host__ __device__ inline int64_t token_slabs(const TokenPass& p, Access access) {
  const int64_t width = token_columns(access) * kWarp;
  return (p.matrix.cols + width - 1) / width;
}

// Blocks that find work.
inline int64_t token_pass_items(const TokenPass& p, Access access) {
  return p.n * token_slabs(p, access);
}

// A lane's columns of row j, or zeros. `slab`: of row 0, where rows are wide.
template <Access access>
__device__ inline uint4 load_columns(const Rows& m, bool wanted, const char* slab, uint32_t bytes,
                                     int32_t j, int64_t col) {
  if constexpr (access != Access::kAny) {
    return load_if(wanted, slab + static_cast<uint64_t>(static_cast<uint32_t>(j)) * bytes);
  } else {
    float v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t at = j * m.row_stride + (col + i) * m.col_stride;
      v[i] = wanted && col + i < m.cols ? load_element(m.data, m.dtype, at) : 0.0f;
    }
    return pack_fp32(v);
  }
}

// acc += weight * raw[u] for all u in their order; lane first + u holds the weight.
template <Access access, bool bf16, int kColumns>
__device__ inline void add_rows(const uint4 (&raw)[kTokenRows], float weight, int first,
                                float (&acc)[kColumns]) {
#pragma unroll
  for (int u = 0; u < kTokenRows; ++u) {
    const float factor = __shfl_sync(kAllLanes, weight, first + u);
    float v[8];
    if constexpr (access != Access::k16) {
      widen_fp32(raw[u], v);
    } else if constexpr (bf16) {
      widen_bf16(raw[u], v);
    } else {
      widen_fp16(raw[u], v);
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) acc[i] = fmaf(factor, v[i], acc[i]);
  }
}

// A lane's entry of 32, as it lies in memory; index -1 where there is none.
struct TokenEntry {
  int32_t index;
  float coefficient, gate;
};

// Nothing here looks at what has been loaded: the next 32 entries are on their way while rows of these are read.
__device__ inline TokenEntry load_entry(const TokenPass& p, int64_t e, int64_t end) {
  const bool inside = e < end, weighted = p.coefficients != nullptr, gated = p.gate != nullptr;
  TokenEntry entry;
  entry.index = static_cast<int32_t>(load_if(inside, p.indices + e, 0xffffffffu));
  entry.coefficient = __uint_as_float(load_if(inside && weighted, p.coefficients + e, 0));
  entry.gate = __uint_as_float(load_if(inside && gated, p.gate + e, __float_as_uint(1.0f)));
  return entry;
}

template <Access access, int kColumns>
__device__ inline void sum_entries(const TokenPass& p, int64_t row, int64_t col, int lane,
                                   float (&acc)[kColumns]) {
  int64_t at = __ldg(p.offsets + row);
  int64_t end = __ldg(p.offsets + row + 1);
  if (at < 0) at = 0;
  if (end > p.capacity) end = p.capacity;
  const bool inside = col < p.matrix.cols;
  const char* slab = first_chunk(p.matrix, col);
  const uint32_t bytes = row_bytes(p.matrix);
  const bool bf16 = p.matrix.dtype == kBFloat16;
  TokenEntry next = load_entry(p, at + lane, end);
  for (; at < end; at += kWarp) {
    // An index out of range contributes nothing, whatever its coefficient is.
    const bool valid = next.index >= 0 && next.index < p.matrix.rows;
    const int32_t index = valid ? next.index : -1;
    const float weight = valid ? next.coefficient * next.gate : 0.0f;
    next = load_entry(p, at + kWarp + lane, end);
    const int count = end - at < kWarp ? static_cast<int>(end - at) : kWarp;
    for (int first = 0; first < count; first += kTokenRows) {
      uint4 raw[kTokenRows];
      int32_t j[kTokenRows];
#pragma unroll
      for (int u = 0; u < kTokenRows; ++u) j[u] = __shfl_sync(kAllLanes, index, first + u);
#pragma unroll
      for (int u = 0; u < kTokenRows; ++u) {
        raw[u] = load_columns<access>(p.matrix, j[u] >= 0 && inside, slab, bytes, j[u], col);
      }
      // Once per group of rows: inside the sum, the choice of the dtype would be made for each row.
      if (bf16) {
        add_rows<access, true>(raw, weight, first, acc);
      } else {
        add_rows<access, false>(raw, weight, first, acc);
      }
    }
  }
}

template <Access access>
__global__ void __launch_bounds__(kTokenThreads, kTokenBlocks) token_pass_kernel(TokenPass p) {
  constexpr int kColumns = token_columns(access);
  const int lane = threadIdx.x;
  const int64_t slabs = token_slabs(p, access);
  for (int64_t item = blockIdx.x; item < p.n * slabs; item += gridDim.x) {
    const int64_t slab = item / p.n;
    const int64_t token = item - slab * p.n;
    const int64_t col = (slab * kWarp + lane) * kColumns;
    float acc[kColumns] = {};
    for (int64_t set = 0; set < p.sets; ++set) {
      sum_entries<access>(p, set * p.n + token, col, lane, acc);
    }
    if (p.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        if (col + i < p.matrix.cols) acc[i] += __ldg(p.bias + col + i);
      }
    }
    if (p.add) add_target(p.out, token, col, acc);
    store_target(p.out, token, col, acc);
  }
}

}  // namespace gemmascope_fast
