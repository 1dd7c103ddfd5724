// emit_strip for the usual strip, in which no thread has more than three hits: the same result in fewer instructions.
//
// emit_strip visits all blocks of the strip, whose code is unrolled. Here a thread picks its hits out of its
// accumulators, by a tree of selections (127 for 256 columns, as registers have no index), and finds their ranks from
// the masks of the four lanes that share its tokens. Strips with more hits, NaN or latents without a limit, and second
// passes, go to emit_strip.
#pragma once

#include "cuda/emit_strip.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {

constexpr int kFewHits = 3;

// acc[index / 4][index % 4], for the index that begins with kFirst in kCount, a power of two.
template <int kFirst, int kCount, int kBlocks>
__device__ __forceinline__ float pick_element(const float (&acc)[kBlocks][4], int index) {
  if constexpr (kCount == 1) {
    return acc[kFirst / 4][kFirst % 4];
  } else {
    const float low = pick_element<kFirst, kCount / 2>(acc, index);
    const float high = pick_element<kFirst + kCount / 2, kCount / 2>(acc, index);
    return (index & (kCount / 2)) != 0 ? high : low;
  }
}

// A hit of a thread; half is -1 for none.
struct FewHit {
  int half, word, bit;
  float pre;
};

// Takes the thread's first hit out of `left`. The value of a candidate means nothing.
template <int kColumns, Limit kLimit>
__device__ __forceinline__ FewHit next_hit(const EncodeTiles& p,
                                           const float (&acc)[kColumns / 8][4], int64_t token,
                                           int lane, const float* bias, const float* limit,
                                           StripHits<kColumns>& left) {
  FewHit hit = {-1, 0, 0, 0.0f};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int word = 0; word < StripHits<kColumns>::kWords; ++word) {
      if (hit.half < 0 && left.mask[half][word] != 0) {
        hit.half = half;
        hit.word = word;
        hit.bit = __ffs(static_cast<int>(left.mask[half][word])) - 1;
        left.mask[half][word] &= left.mask[half][word] - 1;
      }
    }
  }
  if (kLimit == Limit::kScreened) return hit;
  const int index = 64 * hit.word + 4 * (hit.bit / 2) + 2 * (hit.half & 1) + hit.bit % 2;
  const float picked = pick_element<0, kColumns / 2>(acc, index);
  const int column = strip_column(hit.word, hit.bit, lane);
  const float less = kLimit == Limit::kUpperBound ? limit[column] : 0.0f;
  const UpperRow row = upper_row<kLimit>(p, token + (hit.half > 0 ? 8 : 0));
  hit.pre = hit_value<kLimit>(picked, row, bias[column], less);
  return hit;
}

// The masks of the four lanes that share a thread's tokens, lane l % 4 = q in place q.
template <int kColumns>
struct QuadHits {
  StripHits<kColumns> of[4];
};

template <int kColumns>
__device__ __forceinline__ QuadHits<kColumns> quad_hits(const StripHits<kColumns>& hits, int lane) {
  QuadHits<kColumns> quad;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int word = 0; word < StripHits<kColumns>::kWords; ++word) {
        quad.of[q].mask[half][word] =
            __shfl_sync(kWholeWarp, hits.mask[half][word], (lane & 28) + q);
      }
    }
  }
  return quad;
}

// Hits of the same token in lower columns.
template <int kColumns>
__device__ __forceinline__ int rank_of(const QuadHits<kColumns>& quad, const FewHit& hit,
                                       int lane) {
  const uint32_t before_block = (1u << (hit.bit & 30)) - 1;
  const uint32_t with_block = before_block | 3u << (hit.bit & 30);
  const uint32_t own = (1u << hit.bit) - 1;
  int rank = 0;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const uint32_t below = q < lane % 4 ? with_block : q == lane % 4 ? own : before_block;
#pragma unroll
    for (int word = 0; word < StripHits<kColumns>::kWords; ++word) {
      const uint32_t mask = hit.half == 0 ? quad.of[q].mask[0][word] : quad.of[q].mask[1][word];
      const uint32_t kept = word < hit.word ? ~0u : word == hit.word ? below : 0u;
      rank += __popc(mask & kept);
    }
  }
  return rank;
}

__device__ __forceinline__ void write_hit(uint64_t* run, const StripPlace& place, const FewHit& hit,
                                          int rank, int lane) {
  const uint32_t code = static_cast<uint32_t>(rank) << (kRecordRank - 32) |
                        static_cast<uint32_t>(lane / 4 + 8 * hit.half) << (kRecordToken - 32) |
                        static_cast<uint32_t>(strip_column(hit.word, hit.bit, lane));
  const int begin = hit.half == 0 ? place.begin[0] : place.begin[1];
  run[begin + rank] = static_cast<uint64_t>(code) << 32 | __float_as_uint(hit.pre);
}

// The most hits of a thread.
template <int kColumns>
__device__ __forceinline__ int most_hits(const StripHits<kColumns>& hits) {
  unsigned own = 0;
#pragma unroll
  for (int word = 0; word < StripHits<kColumns>::kWords; ++word) {
    own += static_cast<unsigned>(__popc(hits.mask[0][word]) + __popc(hits.mask[1][word]));
  }
  return static_cast<int>(__reduce_max_sync(kWholeWarp, own));
}

// Arguments and result are emit_strip's.
template <int kColumns, Limit kLimit>
__device__ __forceinline__ void emit_strip_of_few(const EncodeTiles& p,
                                                  const float (&acc)[kColumns / 8][4],
                                                  int64_t token0, int64_t latent0,
                                                  int64_t column_block, int lane, const float* bias,
                                                  const float* limit) {
  if (token0 >= p.n || latent0 >= p.last) return;
  StripHits<kColumns> hits;
  compare_strip<kColumns, kLimit>(p, acc, token0 + lane / 4, lane, bias, limit, hits);
  clip_strip<kColumns>(p, token0 + lane / 4, p.last - latent0, lane, hits);
  __syncwarp();  // else the compiler keeps the sums with the biases, 128 registers, until the hits need them
  const int most = most_hits<kColumns>(hits);
  bool odd = most > kFewHits || p.rest != nullptr;
  FewHit few[kFewHits];
  if (!odd) {
    StripHits<kColumns> left = hits;
#pragma unroll
    for (int i = 0; i < kFewHits; ++i) {
      few[i] = {-1, 0, 0, 0.0f};
      if (i < most) {
        few[i] = next_hit<kColumns, kLimit>(p, acc, token0 + lane / 4, lane, bias, limit, left);
      }
      if (kLimit == Limit::kPerLatent && few[i].half >= 0) {
        const float most_of = limit[strip_column(few[i].word, few[i].bit, lane)];
        odd = odd || few[i].pre != few[i].pre || most_of != most_of;
      }
    }
    odd = __any_sync(kWholeWarp, odd);
  }
  if (odd) {
    __syncwarp();  // as above
    emit_strip<kColumns, kLimit>(p, acc, token0, latent0, column_block, lane, bias, limit);
    return;
  }
  const int64_t strip = column_block * strips_of(p) + token0 / kStripTokens;
  const StripPlace place = count_strip<kColumns>(hits, lane);
  uint64_t* run = reserve_strip(p, strip, place, lane);
  if (run == nullptr || most == 0) return;
  const QuadHits<kColumns> quad = quad_hits<kColumns>(hits, lane);
#pragma unroll
  for (int i = 0; i < kFewHits; ++i) {
    if (few[i].half >= 0)
      write_hit(run, place, few[i], rank_of<kColumns>(quad, few[i], lane), lane);
  }
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
