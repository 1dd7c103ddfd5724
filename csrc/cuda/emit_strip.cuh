// The end of a tile of the encoder: one warp turns a strip of 16 tokens x kColumns latents, still in registers, into
// the counts, the run and the records that encode_tiles.cuh describes.
//
// The accumulators are those of m16n8 matrix instructions: acc[m][0..1] belong to token lane / 4 and columns 8 m +
// 2 (lane % 4) + {0, 1}, acc[m][2..3] to token lane / 4 + 8. A *block* is the 16 x 8 elements of one m. All loops over
// blocks are unrolled and every access to acc is static, so that it stays in registers.
//
// Algorithm: one comparison per element sets its bit in one of the thread's masks. Where the warp has none, zeros are
// written. Else NaN and infinite biases are settled, the masks are counted, one atomic reserves the run, and each block
// with hits writes its records: four ballots give an element its rank among its token's hits.
// Bound by the comparisons: 2 instructions per element; a strip of 4096 holds about 4 hits.
#pragma once

#include "cuda/device.cuh"
#include "cuda/encode_tiles.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;

// Hits of a thread: bit 2 (m % 16) + b of word m / 16 is element b of block m, for its lower and its upper token.
template <int kColumns>
struct StripHits {
  static constexpr int kBlocks = kColumns / 8;
  static constexpr int kWords = (kBlocks + 15) / 16;
  uint32_t mask[2][kWords];
};

// Column of bit `bit` of word `word` in lane `lane`.
__device__ __forceinline__ int strip_column(int word, int bit, int lane) {
  return 8 * (16 * word + bit / 2) + 2 * (lane % 4) + bit % 2;
}

__device__ __forceinline__ int64_t strips_of(const EncodeTiles& p) {
  return (p.n + kStripTokens - 1) / kStripTokens;
}

// Whether the first pass had no room for the strip's run. For kernels: skip a tile of the second pass without any.
__device__ __forceinline__ bool strip_is_missing(const EncodeTiles& p, int64_t token0,
                                                 int64_t column_block) {
  const uint64_t run = p.runs[column_block * strips_of(p) + token0 / kStripTokens];
  return (run & kRunBegin) + (run >> kRunCount) > p.arena;
}

// What turns a sum of codes into the most that pre can be: pre = (sum - shift) / scale[i], less limit[j], over bias[j].
struct UpperRow {
  float shift, per_code;
};

template <Limit kLimit>
__device__ __forceinline__ UpperRow upper_row(const EncodeTiles& p, int64_t token) {
  if (kLimit != Limit::kUpperBound || token >= p.n) return {0.0f, 0.0f};
  return {p.bound[token] - __int_as_float(kSumZero), __fdividef(1.0f, p.scale[token])};
}

// The value of a hit.
template <Limit kLimit>
__device__ __forceinline__ float hit_value(float acc, const UpperRow& row, float bias,
                                           float limit) {
  if (kLimit != Limit::kUpperBound) return acc + bias;
  const float sum = static_cast<float>(__float_as_int(acc) - kSumZero);
  return __fdividef(fmaf(sum - row.shift, row.per_code, -limit), bias);
}

template <int kColumns, Limit kLimit>
__device__ __forceinline__ void compare_strip(const EncodeTiles& p,
                                              const float (&acc)[kColumns / 8][4], int64_t token,
                                              int lane, const float* bias, const float* limit,
                                              StripHits<kColumns>& hits) {
  const float* from = (kLimit == Limit::kPerToken ? bias : limit) + 2 * (lane % 4);
  float bound[2] = {0.0f, 0.0f}, scale[2] = {0.0f, 0.0f}, least[2] = {0.0f, 0.0f};
  if (kLimit != Limit::kPerLatent) {
    if (token < p.n) bound[0] = p.bound[token];
    if (token + 8 < p.n) bound[1] = p.bound[token + 8];
  }
  if (multiplies_codes(kLimit)) {
    if (token < p.n) scale[0] = p.scale[token];
    if (token + 8 < p.n) scale[1] = p.scale[token + 8];
  }
  if (kLimit == Limit::kUpperBound) {
    if (token < p.n) least[0] = p.least[token];
    if (token + 8 < p.n) least[1] = p.least[token + 8];
  }
#pragma unroll
  for (int word = 0; word < StripHits<kColumns>::kWords; ++word) {
    hits.mask[0][word] = hits.mask[1][word] = 0;
  }
#pragma unroll
  for (int m = 0; m < StripHits<kColumns>::kBlocks; ++m) {
    const float2 pair = *reinterpret_cast<const float2*>(from + 8 * m);
    float2 unit = {0.0f, 0.0f};
    if (kLimit == Limit::kUpperBound) {
      unit = *reinterpret_cast<const float2*>(bias + 2 * (lane % 4) + 8 * m);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float column = e % 2 == 0 ? pair.x : pair.y;
      if (kLimit == Limit::kUpperBound) {
        column = fmaf(least[e / 2], e % 2 == 0 ? unit.x : unit.y, column);
      }
      const bool hit = kLimit == Limit::kPerLatent ? !(acc[m][e] <= column)
                       : kLimit == Limit::kPerToken
                           ? !(acc[m][e] + column <= bound[e / 2])
                           : !(acc[m][e] <= fmaf(scale[e / 2], column, bound[e / 2]));
      if (hit) hits.mask[e / 2][m / 16] |= 1u << (2 * (m % 16) + e % 2);
    }
  }
  if (kLimit == Limit::kUpperBound) {
#pragma unroll
    for (int word = 0; word < StripHits<kColumns>::kWords; ++word) {
      if (bound[0] != bound[0]) hits.mask[0][word] = 0;
      if (bound[1] != bound[1]) hits.mask[1][word] = 0;
    }
  }
}

// Drops what lies beyond the last token and the last latent.
template <int kColumns>
__device__ __forceinline__ void clip_strip(const EncodeTiles& p, int64_t token, int64_t columns,
                                           int lane, StripHits<kColumns>& hits) {
  const int last = static_cast<int>(columns < kColumns ? columns : kColumns);
  const int beside = last % 8 - 2 * (lane % 4);  // columns of this lane in the block that is cut
  const int bits = 2 * (last / 8) + (beside < 0 ? 0 : beside > 2 ? 2 : beside);
#pragma unroll
  for (int word = 0; word < StripHits<kColumns>::kWords; ++word) {
    const int kept = bits - 32 * word;
    const uint32_t inside = kept <= 0 ? 0 : kept >= 32 ? ~0u : (1u << kept) - 1;
    hits.mask[0][word] &= token < p.n ? inside : 0;
    hits.mask[1][word] &= token + 8 < p.n ? inside : 0;
  }
}

// Bits 2 (m % 16) of word m / 16: blocks in which some lane has a hit. The same in every lane.
template <int kColumns>
__device__ __forceinline__ bool blocks_hit(const StripHits<kColumns>& hits,
                                           uint32_t (&blocks)[StripHits<kColumns>::kWords]) {
  uint32_t any = 0;
#pragma unroll
  for (int word = 0; word < StripHits<kColumns>::kWords; ++word) {
    const uint32_t both = hits.mask[0][word] | hits.mask[1][word];
    blocks[word] = __reduce_or_sync(kWholeWarp, (both | both >> 1) & 0x55555555u);
    any |= blocks[word];
  }
  return any != 0;
}

// JumpReLU: takes invalid entries out of the masks and reports them.
template <int kColumns>
__device__ __forceinline__ void settle_strip(const EncodeTiles& p,
                                             const float (&acc)[kColumns / 8][4], int64_t token,
                                             int64_t latent0, int lane, const float* bias,
                                             const float* limit,
                                             const uint32_t (&blocks)[StripHits<kColumns>::kWords],
                                             StripHits<kColumns>& hits) {
  StripHits<kColumns> nan;
  bool odd = false;
#pragma unroll
  for (int word = 0; word < StripHits<kColumns>::kWords; ++word) {
    nan.mask[0][word] = nan.mask[1][word] = 0;
  }
#pragma unroll
  for (int m = 0; m < StripHits<kColumns>::kBlocks; ++m) {
    if ((blocks[m / 16] >> (2 * (m % 16)) & 1) == 0) continue;
    const float2 add = *reinterpret_cast<const float2*>(bias + 8 * m + 2 * (lane % 4));
    const float2 most = *reinterpret_cast<const float2*>(limit + 8 * m + 2 * (lane % 4));
    odd = odd || most.x != most.x || most.y != most.y;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float pre = acc[m][e] + (e % 2 == 0 ? add.x : add.y);
      if (pre != pre) nan.mask[e / 2][m / 16] |= 1u << (2 * (m % 16) + e % 2);
    }
  }
#pragma unroll
  for (int word = 0; word < StripHits<kColumns>::kWords; ++word) {
    odd = odd || (nan.mask[0][word] | nan.mask[1][word]) != 0;
  }
  if (!odd) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int first = kColumns;  // invalid column of this lane
#pragma unroll
    for (int word = 0; word < StripHits<kColumns>::kWords; ++word) {
      for (uint32_t left = hits.mask[half][word]; left != 0; left &= left - 1) {
        const uint32_t bit = left & (~left + 1);
        const int column = strip_column(word, __ffs(static_cast<int>(left)) - 1, lane);
        const bool pre_is_nan = (nan.mask[half][word] & bit) != 0;
        if (!pre_is_nan && limit[column] == limit[column]) continue;
        const float threshold = p.threshold[latent0 + column];
        const bool invalid = pre_is_nan || threshold != threshold;
        if (invalid && first == kColumns) first = column;
        // Else pre is the infinite bias.
        if (invalid || !(bias[column] > threshold - p.window)) hits.mask[half][word] &= ~bit;
      }
    }
    if (first < kColumns) {
      atomicMax(p.invalid + token + 8 * half, static_cast<int32_t>(p.d_sae - latent0 - first));
    }
  }
}

// Where the hits of a thread's two tokens begin in the run, and how many the run has.
struct StripPlace {
  int begin[2];
  int count[2];
  int total;
};

template <int kColumns>
__device__ __forceinline__ StripPlace count_strip(const StripHits<kColumns>& hits, int lane) {
  uint32_t sum = 0;  // of the lower token, and of the upper one from bit 16 on
#pragma unroll
  for (int word = 0; word < StripHits<kColumns>::kWords; ++word) {
    sum += static_cast<uint32_t>(__popc(hits.mask[0][word])) +
           (static_cast<uint32_t>(__popc(hits.mask[1][word])) << 16);
  }
  sum += __shfl_xor_sync(kWholeWarp, sum, 1);
  sum += __shfl_xor_sync(kWholeWarp, sum, 2);
  uint32_t up_to = sum;  // inclusive over the tokens, which are 4 lanes apart
#pragma unroll
  for (int step = 4; step < 32; step *= 2) {
    const uint32_t before = __shfl_up_sync(kWholeWarp, up_to, step);
    if (lane >= step) up_to += before;
  }
  const uint32_t all = __shfl_sync(kWholeWarp, up_to, 31);
  StripPlace place;
  place.count[0] = static_cast<int>(sum & 0xffff);
  place.count[1] = static_cast<int>(sum >> 16);
  place.begin[0] = static_cast<int>(up_to & 0xffff) - place.count[0];
  place.begin[1] = static_cast<int>((all & 0xffff) + (up_to >> 16)) - place.count[1];
  place.total = static_cast<int>((all & 0xffff) + (all >> 16));
  return place;
}

// The hits of one block and one half of the tokens: `pair` are the thread's two bits. `seen`, the hits of the token in
// earlier blocks, moves on.
__device__ __forceinline__ void emit_pair(uint64_t* out, uint32_t pair, float first, float second,
                                          int token, int column, int lane, int& seen) {
  const unsigned quad = 0xfu << (lane & 28);
  const unsigned below = quad & ((1u << lane) - 1);
  const unsigned firsts = __ballot_sync(kWholeWarp, (pair & 1) != 0);
  const unsigned seconds = __ballot_sync(kWholeWarp, (pair & 2) != 0);
  int rank = seen + __popc(firsts & below) + __popc(seconds & below);
  seen += __popc(firsts & quad) + __popc(seconds & quad);
  uint32_t code = static_cast<uint32_t>(rank) << (kRecordRank - 32) |
                  static_cast<uint32_t>(token) << (kRecordToken - 32) |
                  static_cast<uint32_t>(column);
  if (pair & 1) {
    out[rank] = static_cast<uint64_t>(code) << 32 | __float_as_uint(first);
    code += 1u << (kRecordRank - 32);
    ++rank;
  }
  if (pair & 2) out[rank] = static_cast<uint64_t>(code + 1) << 32 | __float_as_uint(second);
}

template <int kColumns, Limit kLimit>
__device__ __forceinline__ void write_strip(const EncodeTiles& p,
                                            const float (&acc)[kColumns / 8][4], int64_t token,
                                            uint64_t* run, const StripPlace& place, int lane,
                                            const float* bias, const float* limit,
                                            const uint32_t (&blocks)[StripHits<kColumns>::kWords],
                                            const StripHits<kColumns>& hits) {
  const UpperRow rows[2] = {upper_row<kLimit>(p, token), upper_row<kLimit>(p, token + 8)};
  int seen[2] = {0, 0};
#pragma unroll
  for (int m = 0; m < StripHits<kColumns>::kBlocks; ++m) {
    if ((blocks[m / 16] >> (2 * (m % 16)) & 1) == 0) continue;
    const int column = 8 * m + 2 * (lane % 4);
    const float2 add = *reinterpret_cast<const float2*>(bias + column);
    float2 less = {0.0f, 0.0f};
    if (kLimit == Limit::kUpperBound) less = *reinterpret_cast<const float2*>(limit + column);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      emit_pair(run + place.begin[half], hits.mask[half][m / 16] >> (2 * (m % 16)) & 3,
                hit_value<kLimit>(acc[m][2 * half], rows[half], add.x, less.x),
                hit_value<kLimit>(acc[m][2 * half + 1], rows[half], add.y, less.y),
                lane / 4 + 8 * half, column, lane, seen[half]);
    }
  }
}

// First pass: counts, and a run of the arena. Second pass: where the run's records go. Null: they have no place.
__device__ __forceinline__ uint64_t* reserve_strip(const EncodeTiles& p, int64_t strip,
                                                   const StripPlace& place, int lane) {
  if (p.rest != nullptr) return p.rest + ((p.runs[strip] & kRunBegin) - p.rest_begin);
  if (lane % 4 < 2) {
    p.counts[strip * kStripTokens + lane / 4 + 8 * (lane % 4)] =
        static_cast<uint16_t>(lane % 4 == 0 ? place.count[0] : place.count[1]);
  }
  unsigned long long begin = 0;
  if (lane == 0) {
    if (place.total > 0) {
      begin = atomicAdd(p.needed, static_cast<unsigned long long>(place.total));
    }
    p.runs[strip] = begin | static_cast<uint64_t>(place.total) << kRunCount;
  }
  begin = __shfl_sync(kWholeWarp, begin, 0);
  return begin + place.total > p.arena ? nullptr : p.records + begin;
}

// One warp, converged. The strip is tokens token0 .. + 15 (a multiple of 16), latents latent0 = p.first + column_block
// * kColumns .. + kColumns - 1. bias and limit hold kColumns floats of these latents (whatever beyond the last latent),
// are 8-byte aligned and may be in shared or global memory; limit is not read for kPerToken. For kScreened the
// bias is added to values that nobody reads.
template <int kColumns, Limit kLimit>
__device__ __forceinline__ void emit_strip(const EncodeTiles& p,
                                           const float (&acc)[kColumns / 8][4], int64_t token0,
                                           int64_t latent0, int64_t column_block, int lane,
                                           const float* bias, const float* limit) {
  static_assert(kColumns % 8 == 0 && kColumns <= 256, "a record's column and rank have 8 bits");
  if (token0 >= p.n || latent0 >= p.last) return;
  if (p.rest != nullptr && !strip_is_missing(p, token0, column_block)) return;
  const int64_t token = token0 + lane / 4;
  const int64_t strip = column_block * strips_of(p) + token0 / kStripTokens;
  StripHits<kColumns> hits;
  compare_strip<kColumns, kLimit>(p, acc, token, lane, bias, limit, hits);
  clip_strip<kColumns>(p, token, p.last - latent0, lane, hits);
  uint32_t blocks[StripHits<kColumns>::kWords];
  if (!blocks_hit<kColumns>(hits, blocks)) {
    // 32 bytes of counts, aligned to their size.
    if (lane < 2) {
      reinterpret_cast<uint4*>(p.counts + strip * kStripTokens)[lane] = make_uint4(0, 0, 0, 0);
    }
    if (lane == 2) p.runs[strip] = 0;
    return;
  }
  if (kLimit == Limit::kPerLatent) {
    settle_strip<kColumns>(p, acc, token, latent0, lane, bias, limit, blocks, hits);
  }
  const StripPlace place = count_strip<kColumns>(hits, lane);
  uint64_t* run = reserve_strip(p, strip, place, lane);
  if (run != nullptr) {
    // Else the compiler keeps what was compared with, 128 registers, until here.
    if (kLimit == Limit::kUpperBound) __syncwarp();
    write_strip<kColumns, kLimit>(p, acc, token, run, place, lane, bias, limit, blocks, hits);
  }
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
