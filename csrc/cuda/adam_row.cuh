// Adam on one row of a matrix, by the threads of one block: what adam_step_ and fused_sparse_step share, bits included.
//
// The gradient lies in shared memory, where the new row replaces it, so that no thread holds more than two quads of
// columns: what the next one needs is read while one is computed. A warp covers 128 columns at a time. The sums of
// remove_parallel and unit_norm add neighbours in pairs, then pairs of pairs, up to 128 columns; lane l of 32 then adds
// blocks l, l + 32, ... in order, and the lanes are added in pairs: no bit depends on the threads or on how a row is
// cut. A row moves when its gradient has an element other than 0 (NaN counts), or had one at most `tail` steps ago;
// nothing but the gradient and touched_at is read of the others.
// Bound by memory: w and v, read and written, 16 bytes per element in float32, 8 more with a first moment.
#pragma once

#include "cuda/adam_narrow.cuh"

namespace gemmascope_fast {

constexpr int kAdamLargestRow = 8192;  // longest row in shared memory
constexpr int kAdamBlocks = kAdamLargestRow / kMomentColumns;

struct AdamShared {
  float sums[3][kAdamBlocks];  // of each block of 128 columns: <g, w>, <w, w>, |new w|^2
  float decays[2];
};

// Bytes of shared memory that a gradient of `cols` columns takes.
GSF_BOTH int64_t adam_row_bytes(int64_t cols) { return (cols + 3) / 4 * 16; }

// The decays of a row: a power takes two thousand cycles of one thread, so two warps take one each. Blocks have at least
// 64 threads; the last thread's number would stay in a register, and 10.0 has none left.
__device__ inline void share_decays(const AdamView& a, int64_t gap, AdamShared* shared) {
  if (threadIdx.x == 0) shared->decays[1] = adam_power(a.beta2, gap);
  if (threadIdx.x == 32 && a.exp_avg != nullptr) shared->decays[0] = adam_power(a.beta1, gap);
}

// Columns that the block covers at a time; the calling thread's first of them.
__device__ inline int64_t block_columns() { return static_cast<int64_t>(blockDim.x) * 4; }
__device__ inline int64_t first_column() { return static_cast<int64_t>(threadIdx.x) * 4; }

// Whether a quad of any lane of the warp begins inside the row: all lanes go on together.
__device__ inline bool warp_inside(const AdamView& a, int64_t column) {
  return column - static_cast<int64_t>(threadIdx.x % 32) * 4 < a.cols;
}

// A quad of what lies in shared memory, 0 beyond the row.
__device__ inline void take_quad(const AdamView& a, const float* g, int64_t column,
                                 float (&out)[4]) {
  const bool inside = column < a.cols;
  const float4 quad =
      inside ? *reinterpret_cast<const float4*>(g + column) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  out[0] = quad.x;
  out[1] = quad.y;
  out[2] = quad.z;
  out[3] = quad.w;
}

__device__ inline void put_quad(const AdamView& a, float* g, int64_t column, const float (&in)[4]) {
  if (column < a.cols) {
    *reinterpret_cast<float4*>(g + column) = make_float4(in[0], in[1], in[2], in[3]);
  }
}

// <g, w> and <w, w> by blocks of 128 columns.
__device__ inline void measure_parallel(const AdamView& a, int64_t row, const float* g,
                                        AdamShared* shared) {
#pragma unroll 1
  for (int64_t column = first_column(); warp_inside(a, column); column += block_columns()) {
    float w[4], mine[4];
    load_quad(weight_row(a, row), a.weight_dtype, column, a.cols, w);
    take_quad(a, g, column, mine);
    keep_block(shared->sums[0], column, block_sum(mine, w));
    keep_block(shared->sums[1], column, block_sum(w, w));
  }
}

// Takes the row's share of w out of g, where is_narrow.
__device__ inline void subtract_share(const NarrowRow& r, float share, float* g) {
#pragma unroll 1
  for (uint32_t column = threadIdx.x * 4; column < r.cols; column += blockDim.x * 4) {
    float w[4];
    widen_narrow(r.weight[column / 4], w);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      g[column + e] = rounded_sub(g[column + e], rounded_mul(share, w[e]));
  }
}

// As update_row, where is_narrow.
__device__ inline void update_narrow_row(const AdamView& a, int64_t row, const AdamDecays& decays,
                                         float* g) {
  const NarrowRow r = narrow_row(a, row);
  if (decays.share != 0.0f) subtract_share(r, decays.share, g);  // NaN included
  const RandomRow random = random_row(a, row);
  const uint32_t stride = blockDim.x * 4;
  uint32_t column = threadIdx.x * 4;
  if (column >= r.cols) return;
  // A quad is computed in less time than a load takes: two are on their way.
  NarrowQuad next = load_narrow(r, column), then = {};
  if (column + stride < r.cols) then = load_narrow(r, column + stride);
#pragma unroll 1
  for (; column < r.cols; column += stride) {
    const NarrowQuad quad = next;
    next = then;
    if (column + 2 * stride < r.cols) then = load_narrow(r, column + 2 * stride);
    float4* at = reinterpret_cast<float4*>(g + column);
    float mine[4] = {at->x, at->y, at->z, at->w};
    narrow_quad(a, r, random, column, decays.second, quad, a.unit_norm, mine);
    if (a.unit_norm) *at = make_float4(mine[0], mine[1], mine[2], mine[3]);
  }
}

// The new row: into g with unit_norm, else stored.
__device__ inline void update_row(const AdamView& a, int64_t row, const AdamDecays& decays,
                                  float* g) {
  AdamQuad next;
  load_state(a, row, first_column(), &next);
#pragma unroll 1
  for (int64_t column = first_column(); warp_inside(a, column); column += block_columns()) {
    AdamQuad quad = next;
    if (warp_inside(a, column + block_columns()))
      load_state(a, row, column + block_columns(), &next);
    float mine[4];
    take_quad(a, g, column, mine);
    adam_quad<true>(a, row, column, decays, &quad, mine);
    if (a.unit_norm) {
      put_quad(a, g, column, mine);
    } else {
      store_weight(a, row, column, mine);
    }
  }
}

// Divides the new row in g by its norm, and stores it.
__device__ inline void normalise_row(const AdamView& a, int64_t row, const float* g,
                                     AdamShared* shared) {
  float w[4];
#pragma unroll 1
  for (int64_t column = first_column(); warp_inside(a, column); column += block_columns()) {
    take_quad(a, g, column, w);
    keep_block(shared->sums[2], column, block_sum(w, w));
  }
  __syncthreads();
  const float square = row_sum(shared->sums[2], column_blocks(a));
#pragma unroll 1
  for (int64_t column = first_column(); warp_inside(a, column); column += block_columns()) {
    take_quad(a, g, column, w);
    store_normalised(a, row, column, square, w);
  }
}

// The update of a row whose decays lie in `shared`, sums of remove_parallel too where `parallel`; all of g is there.
__device__ inline void move_row(const AdamView& a, int64_t row, float* g, bool touched,
                                bool parallel, AdamShared* shared) {
  if (touched && threadIdx.x == 0) a.touched_at[row] = a.step;
  AdamDecays decays = {shared->decays[0], shared->decays[1], 0.0f};
  if (parallel) {
    const int64_t blocks = column_blocks(a);
    decays.share =
        parallel_share(row_sum(shared->sums[0], blocks), row_sum(shared->sums[1], blocks));
  }
  if (is_narrow(a)) {
    update_narrow_row(a, row, decays, g);
  } else {
    update_row(a, row, decays, g);
  }
  if (a.unit_norm) normalise_row(a, row, g, shared);
}

// One step of one row from its gradient g in shared memory, 0 beyond the row up to a multiple of four columns; g is
// overwritten. All threads of the block, whole warps, call it; `nonzero`: of what the calling thread put into g.
// Afterwards a thread may put the next gradient where it reads its quads at once, elsewhere after a barrier.
__device__ inline void adam_row(const AdamView& a, int64_t row, float* g, bool nonzero,
                                AdamShared* shared) {
  const int64_t at = a.touched_at[row];
  const bool touched = __syncthreads_or(nonzero) != 0;  // and all of g is there
  if (!touched && !adam_live(at, a.step, a.tail)) return;
  const bool parallel = touched && a.remove_parallel;
  share_decays(a, adam_gap(at, a.step, a.tail), shared);
  if (parallel) measure_parallel(a, row, g, shared);
  __syncthreads();
  move_row(a, row, g, touched, parallel, shared);
}

}  // namespace gemmascope_fast
