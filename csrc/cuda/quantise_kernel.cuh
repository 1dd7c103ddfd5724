// int8 codes of rotated rows, and the constants with which int32 sums of their products decide what may pass a limit.
//
//   x_i . w_j = c . w_j + (1 / B) H(x_i - c) . H w_j
//   H(x_i - c) = (q_i + e_i) / u_i,   H w_j = (p_j + f_j) / v_j,   q, p int8; u_i, v_j codes per unit
//   u_i v_j B (x_i . w_j - c . w_j) = q . p + error,   error = q . f + e . p + e . f
//
// H is a Hadamard transform of blocks of B = 128 or 256 elements; element k lies in block k mod (width / B), so that
// neighbouring large dimensions go to different ones. Codes are rounded up with the chance of what they lack to the
// next one, by a number drawn once for each column (one for tokens, one for latents): so the errors of the columns are
// independent and have mean 0 whatever the data are, also where few dimensions are alive and the transform repeats
// itself, where the errors of rounding to nearest would repeat as well. With y = q + e, z = p + f, and v the sum of the
// variances of a row's errors, the error of the sum is about Gaussian, with
//
//   sigma_i^2 = |y_i|^2 / 6 + v_i (kRowRms^2 + 1 / 6)   >=   (|y|^2 v_f + v_e |z|^2 + v_e v_f) / width
//
// since v_f = width / 6 where fractions are spread evenly (width / 4 at most), and no row's root mean square is above
// kRowRms codes: the scale of a row is the smaller of 127 / largest and kRowRms / rms. So a token's margin needs
// nothing of the latents. An entry is a candidate when
//
//   q . p > u_i T_j - kScreenKappa sigma_i,   T_j = (limit_j - c . w_j) v_j B
//
// An entry that passes its limit by nothing at all is missed with the chance that a Gaussian exceeds kScreenKappa = 5,
// 3e-7. Most pass by far more: where z = x . w is Gaussian and theta = 3.5 sd(z) (64 of 262,144 latents), the excess is
// about exponential with mean sd(z) / 3.5 = 16 sigma, and 3e-9 of the entries are missed. Rows and latents that are not
// finite or whose largest element is outside 2^-40 .. 2^40 have NaN for constants: all their entries are candidates.
//
// Of weights that train, the latents that a step of Adam moved are quantised again: a row moves in no other step than
// those in which adam_live holds of what the step leaves in touched_at.
//
// Bound by memory: a row is read once, its codes written once.
#pragma once

#include "cuda/adam_element.cuh"
#include "cuda/device.cuh"
#include "cuda/rows.cuh"
#include "cuda/screened_rows.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {

constexpr int kQuantiseThreads = 256;
constexpr int kQuantiseWarps = kQuantiseThreads / kWarp;

constexpr float kScreenKappa = 5.0f;
constexpr float kRowRms = 36.0f;  // Gaussian rows of 5376 elements have 32
constexpr float kLeastLargest = 0x1p-40f, kMostLargest = 0x1p40f;
constexpr float kScreenZero = 12582912.0f;  // 1.5 * 2^23: where the tiles' sums begin
constexpr float kScreenRounding = 2.0f;     // of u T + bound, which is of the size of kScreenZero

// Sums over the CTA by a fixed tree; every thread has them. `parts` is shared and free again after the next barrier.
struct RowSums {
  float largest, squares, dot;
};
__device__ inline RowSums sum_rows(RowSums v, RowSums* parts) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    v.largest = fmaxf(v.largest, __shfl_xor_sync(kAllLanes, v.largest, distance));
    v.squares += __shfl_xor_sync(kAllLanes, v.squares, distance);
    v.dot += __shfl_xor_sync(kAllLanes, v.dot, distance);
  }
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = v;
  __syncthreads();
  v = parts[0];
#pragma unroll
  for (int w = 1; w < kQuantiseWarps; ++w) {
    v.largest = fmaxf(v.largest, parts[w].largest);
    v.squares += parts[w].squares;
    v.dot += parts[w].dot;
  }
  return v;
}

// Row `row` as float32 to values [width]: less the centre, or as it is with its product with the centre as the result.
template <bool kLatents>
__device__ inline float load_row(const QuantiseRows& p, int64_t row, float* values) {
  float dot = 0.0f;
  for (int64_t col = threadIdx.x * kChunk; col < p.width; col += kQuantiseThreads * kChunk) {
    float v[kChunk];
    load_floats(p.rows, row, col, v);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float c = p.center[col + i];
      if (kLatents) {
        dot = fmaf(c, v[i], dot);
      } else {
        v[i] -= c;
      }
    }
#pragma unroll
    for (int i = 0; i < kChunk; i += 4) {
      *reinterpret_cast<float4*>(values + col + i) =
          make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
    }
  }
  return dot;
}

// Transforms block `block` of the row in place. One warp, kPer elements a lane; returns their largest and their
// squares.
template <int kPer>
__device__ inline void transform_block(float* values, int64_t block, int64_t step, RowSums& sums) {
  const int lane = threadIdx.x % kWarp;
  float v[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) v[i] = values[(lane + kWarp * i) * step + block];
#pragma unroll
  for (int half = 1; half < kPer; half *= 2) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      if ((i & half) != 0) continue;
      const float a = v[i], b = v[i + half];
      v[i] = a + b;
      v[i + half] = a - b;
    }
  }
#pragma unroll
  for (int half = 1; half < kWarp; half *= 2) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const float other = __shfl_xor_sync(kAllLanes, v[i], half);
      v[i] = (lane & half) != 0 ? other - v[i] : v[i] + other;
    }
  }
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    values[(lane + kWarp * i) * step + block] = v[i];
    sums.largest = fmaxf(sums.largest, fabsf(v[i]));
    sums.squares = fmaf(v[i], v[i], sums.squares);
  }
}

// In 0 .. 1, the same in every run: what is added to a column's codes before they are rounded down.
template <bool kLatents>
__device__ inline float rounding_of(uint32_t column) {
  uint32_t h = column * 0x9e3779b9u + (kLatents ? 0x85ebca6bu : 0x27d4eb2fu);
  h = (h ^ h >> 16) * 0x7feb352du;
  h = (h ^ h >> 15) * 0x846ca68bu;
  return static_cast<float>((h ^ h >> 16) >> 8) * 0x1p-24f;
}

// Codes of block `block`; element lane + 32 i of the transform takes place kPer lane + i. Returns the variances of
// their errors.
template <bool kLatents, int kPer>
__device__ inline float code_block(const float* values, int64_t block, int64_t step, float scale,
                                   int8_t* codes) {
  const int lane = threadIdx.x % kWarp;
  const int64_t first = (block * kWarp + lane) * kPer;
  uint32_t word[kPer / 4] = {};
  float variance = 0.0f;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const float y = scale != 0.0f ? values[(lane + kWarp * i) * step + block] * scale : 0.0f;
    const float fraction = y - floorf(y);
    variance = fmaf(fraction, 1.0f - fraction, variance);
    const float raised = y + rounding_of<kLatents>(static_cast<uint32_t>(first + i));
    const int code = static_cast<int>(fminf(floorf(raised), 127.0f));
    word[i / 4] |= (static_cast<uint32_t>(code) & 255) << (8 * (i % 4));
  }
  if constexpr (kPer == 8) {
    *reinterpret_cast<uint2*>(codes + first) = make_uint2(word[0], word[kPer / 4 - 1]);
  } else {
    *reinterpret_cast<uint32_t*>(codes + first) = word[0];
  }
  return variance;
}

// Codes per unit of a row, 0 where the row cannot be screened. A row of zeros has so many that any limit's sign
// decides.
__device__ inline float row_scale(const RowSums& row, int64_t width) {
  if (row.largest == 0.0f && row.squares == 0.0f) return kMostLargest;
  const bool finite = row.squares < __int_as_float(0x7f800000);  // false for NaN
  if (!finite || !(row.largest >= kLeastLargest && row.largest <= kMostLargest)) return 0.0f;
  const float rms = sqrtf(row.squares / static_cast<float>(width));
  return fminf(127.0f / row.largest, kRowRms / rms);
}

// `squares` of the transformed row, and the variances of its codes' errors, added up.
__device__ inline void finish_token(const QuantiseRows& p, int64_t row, float scale, float squares,
                                    float variances) {
  const float variance =
      squares * scale * scale * (1.0f / 6) + variances * (kRowRms * kRowRms + 1.0f / 6);
  p.scale[row] = scale;
  p.bound[row] = scale == 0.0f ? __int_as_float(0x7fc00000)
                               : kScreenZero - fmaf(kScreenKappa, sqrtf(variance), kScreenRounding);
}

__device__ inline void finish_latent(const QuantiseRows& p, int64_t row, float scale, float dot) {
  const bool usable = scale != 0.0f && fabsf(dot) < __int_as_float(0x7f800000);
  const bool was_usable = p.latents[row].scale == p.latents[row].scale;  // 0 before the first codes
  p.latents[row].scale =
      usable ? scale * static_cast<float>(screened_block(p.width)) : __int_as_float(0x7fc00000);
  p.latents[row].dot = dot;
  if (usable != was_usable) atomicAdd(p.unscreened, usable ? -1 : 1);
}

// Dynamic shared memory: width floats. A CTA takes one row at a time.
template <bool kLatents>
__global__ void __launch_bounds__(kQuantiseThreads) quantise_kernel(QuantiseRows p) {
  GSF_DYNAMIC_SHARED(float, values);
  __shared__ RowSums parts[2][kQuantiseWarps];
  const int64_t block = screened_block(p.width), step = p.width / block;
  const int warp = threadIdx.x / kWarp;
  for (int64_t row = blockIdx.x; row < p.count; row += gridDim.x) {
    if (p.touched_at != nullptr && !adam_live(p.touched_at[row], p.step, p.tail)) continue;
    RowSums sums = {0.0f, 0.0f, 0.0f};
    sums.dot = load_row<kLatents>(p, row, values);
    __syncthreads();
    for (int64_t b = warp; b < step; b += kQuantiseWarps) {
      if (block == 256) {
        transform_block<8>(values, b, step, sums);
      } else {
        transform_block<4>(values, b, step, sums);
      }
    }
    const RowSums whole = sum_rows(sums, parts[0]);
    const float scale = row_scale(whole, p.width);
    int8_t* codes = p.codes + row * p.width;
    sums = {0.0f, 0.0f, 0.0f};
    for (int64_t b = warp; b < step; b += kQuantiseWarps) {
      if (block == 256) {
        sums.squares += code_block<kLatents, 8>(values, b, step, scale, codes);
      } else {
        sums.squares += code_block<kLatents, 4>(values, b, step, scale, codes);
      }
    }
    const float variances = sum_rows(sums, parts[1]).squares;
    if (threadIdx.x == 0) {
      if (kLatents) {
        finish_latent(p, row, scale, whole.dot);
      } else {
        finish_token(p, row, scale, whole.squares, variances);
      }
    }
  }
}

// limit [d_sae], of encode_limit_kernel.cuh, becomes T; NaN where every entry of the latent is a candidate.
__global__ void __launch_bounds__(kQuantiseThreads)
    screen_limit_kernel(const LatentCodes* latents, int64_t d_sae, float* limit) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (j < d_sae) limit[j] = (limit[j] - latents[j].dot) * latents[j].scale;
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
