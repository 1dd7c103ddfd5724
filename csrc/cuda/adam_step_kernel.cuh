// Adam on every row of a matrix that has a gradient or is live: device code of adam_step_.
//
// One block per row reads its gradient once, into shared memory (adam_row.cuh). Rows beyond 8,192 columns (biases,
// decoders of crosscoders) are cut into slabs, a block each, and what the whole row decides is found by launches
// before:
//
//   look      whether the row has a gradient; touched_at before this step
//   sums      <g, w> and <w, w>, with remove_parallel
//   measure   |new w|^2, with unit_norm: the new row is computed, not stored, and computed again
//   store     the update
//
// Bound by the gradient, all of it read to find the touched rows, and 16 bytes per element of those in float32.
#pragma once

#include "cuda/adam_row.cuh"

namespace gemmascope_fast {

constexpr int kSlabThreads = 256;
constexpr int64_t kSlab = int64_t{kSlabThreads} * 4;

struct AdamGradient {
  const void* data;  // [rows, cols], rows contiguous
  int64_t stride;
  int dtype;
};

__device__ inline const void* gradient_row(const AdamGradient& g, int64_t row) {
  return static_cast<const char*>(g.data) + row * g.stride * (g.dtype == kFloat32 ? 4 : 2);
}

constexpr int kGradientQuads = 4;  // in flight per thread

// Reads a row into g; whether one of the calling thread's elements is not 0.
__device__ inline bool read_gradient(const AdamView& a, const AdamGradient& gradient, int64_t row,
                                     float* g) {
  const void* from = gradient_row(gradient, row);
  bool nonzero = false;
#pragma unroll 1
  for (int64_t column = first_column(); column < a.cols;
       column += kGradientQuads * block_columns()) {
    float quad[kGradientQuads][4];
#pragma unroll
    for (int i = 0; i < kGradientQuads; ++i) {
      load_quad(from, gradient.dtype, column + i * block_columns(), a.cols, quad[i]);
    }
#pragma unroll
    for (int i = 0; i < kGradientQuads; ++i) {
      nonzero |= quad_nonzero(quad[i]);
      put_quad(a, g, column + i * block_columns(), quad[i]);
    }
  }
  return nonzero;
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads, 768 / kThreads)
    adam_step_kernel(AdamView a, AdamGradient gradient) {
  GSF_DYNAMIC_SHARED(float, g);
  __shared__ AdamShared shared;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const bool nonzero = read_gradient(a, gradient, row, g);
    adam_row(a, row, g, nonzero, &shared);
  }
}

// ---- rows in slabs

struct AdamSlabs {
  int64_t slabs;    // of a row
  int32_t* found;   // [rows] whether the row has a gradient; starts at 0
  int64_t* before;  // [rows] touched_at before this step
  float* sums;  // [3][rows][cols / 128 rounded up], as AdamShared's; null when no option needs them
};

enum class SlabWork : int { kLook, kSums, kMeasure, kStore };

struct SlabPart {
  int64_t row, column;
  bool leads;  // the first thread of the row
};

__device__ inline SlabPart slab_part(const AdamSlabs& s, int64_t block) {
  const int64_t row = block / s.slabs;
  const int64_t column = block % s.slabs * kSlab + first_column();
  return {row, column, column == 0};
}

__device__ inline float* slab_sums(const AdamView& a, const AdamSlabs& s, int which, int64_t row) {
  return s.sums + (which * a.rows + row) * column_blocks(a);
}

__device__ inline float slab_total(const AdamView& a, const AdamSlabs& s, int which, int64_t row) {
  return row_sum(slab_sums(a, s, which, row), column_blocks(a));
}

__device__ inline void keep_sum(const AdamView& a, const AdamSlabs& s, int which,
                                const SlabPart& at, float sum) {
  if (at.column < a.cols) keep_block(slab_sums(a, s, which, at.row), at.column, sum);
}

__device__ inline void look(const AdamView& a, const AdamSlabs& s, const SlabPart& at,
                            const float (&g)[4]) {
  const bool any = __any_sync(0xffffffffu, quad_nonzero(g)) != 0;
  if (any && threadIdx.x % 32 == 0) atomicOr(&s.found[at.row], 1);
  if (at.leads) s.before[at.row] = a.touched_at[at.row];
}

// The decays of a row; all threads of the block call it.
__device__ inline AdamDecays slab_decays(const AdamView& a, const AdamSlabs& s, int64_t row,
                                         bool touched, AdamShared* shared) {
  const int64_t gap = adam_gap(s.before[row], a.step, a.tail);
  __syncthreads();  // the slab before has read them
  share_decays(a, gap, shared);
  __syncthreads();
  AdamDecays decays = {shared->decays[0], shared->decays[1], 0.0f};
  if (touched && a.remove_parallel) {
    decays.share = parallel_share(slab_total(a, s, 0, row), slab_total(a, s, 1, row));
  }
  return decays;
}

template <SlabWork kWork>
__device__ inline void slab_update(const AdamView& a, const AdamSlabs& s, const SlabPart& at,
                                   float (&g)[4], AdamShared* shared) {
  const bool touched = s.found[at.row] != 0;
  if (!touched && !adam_live(s.before[at.row], a.step, a.tail)) return;
  AdamQuad quad;
  load_state(a, at.row, at.column, &quad);
  const AdamDecays decays = slab_decays(a, s, at.row, touched, shared);
  adam_quad<kWork == SlabWork::kStore>(a, at.row, at.column, decays, &quad, g);
  if (kWork == SlabWork::kMeasure) {
    keep_sum(a, s, 2, at, block_sum(g, g));
    return;
  }
  if (a.unit_norm) {
    store_normalised(a, at.row, at.column, slab_total(a, s, 2, at.row), g);
  } else {
    store_weight(a, at.row, at.column, g);
  }
  if (touched && at.leads) a.touched_at[at.row] = a.step;
}

template <SlabWork kWork>
__global__ void __launch_bounds__(kSlabThreads)
    adam_slab_kernel(AdamView a, AdamGradient gradient, AdamSlabs s) {
  __shared__ AdamShared shared;
  for (int64_t block = blockIdx.x; block < a.rows * s.slabs; block += gridDim.x) {
    const SlabPart at = slab_part(s, block);
    float g[4];
    load_quad(gradient_row(gradient, at.row), gradient.dtype, at.column, a.cols, g);
    if (kWork == SlabWork::kLook) {
      look(a, s, at, g);
    } else if (kWork == SlabWork::kSums) {
      if (s.found[at.row] == 0) continue;
      float w[4];
      load_quad(weight_row(a, at.row), a.weight_dtype, at.column, a.cols, w);
      keep_sum(a, s, 0, at, block_sum(g, w));
      keep_sum(a, s, 1, at, block_sum(w, w));
    } else {
      slab_update<kWork>(a, s, at, g, &shared);
    }
  }
}

}  // namespace gemmascope_fast
