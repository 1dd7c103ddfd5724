// From the runs that the encoder's strips left (encode_tiles.cuh) to canonical CSR.
//
//   position = offsets[token] + bases[group][token] + counts[column block][token] + rank
//
// scan_counts_kernel turns the counts of each group of kScanBlocks column blocks into exclusive sums, in place, and
// adds the group up; scan_groups_kernel does the same with the groups, and leaves each token's total. CUB sums the
// totals to offsets (encode_tiles.cu). scan_few_kernel is all three for at most 16 tokens. place_kernel moves every
// record; an entry behind its token's first invalid latent moves up by one, and the gap is filled, as is what lies
// behind the entries.
// Bound by memory and latency: 4 bytes per count, and about 60 bytes of scattered traffic per entry.
#pragma once

#include "cuda/device.cuh"
#include "cuda/encode_tiles.cuh"

namespace gemmascope_fast {
inline namespace on_cuda {

constexpr int kPlaceThreads = 256;
constexpr int kRunLanes = 8;  // that move the records of a run
// As many blocks as a multiprocessor has threads for, 2048 or 1536.
constexpr int kPlaceBlocks = kCapability == 86 || kCapability == 89 || kCapability >= 120 ? 6 : 8;
constexpr int kScanBlocks = 32;  // 32 x 256 hits of a token in a group: two sums fit in one word

struct PlaceHits {
  EncodeTiles tiles;  // counts become exclusive sums within their group
  int width;          // latents of a column block
  int64_t column_blocks;
  uint32_t* bases;  // [groups][strips * 16]
  int64_t*
      offsets;  // [n + 1]: totals of scan_groups_kernel, their sums, at last at most the capacity
  int64_t* needed;  // [1] entries of the result, whether they fit or not
  int64_t capacity;
  bool exact;        // the host looks whether all entries fit: offsets stay
  int32_t* indices;  // [capacity]
  float* values;     // [capacity]
  float* gate;       // [capacity]; null for kPerToken

  __host__ __device__ int64_t strips() const { return (tiles.n + kStripTokens - 1) / kStripTokens; }
  __host__ __device__ int64_t tokens() const { return strips() * kStripTokens; }
  __host__ __device__ int64_t groups() const {
    return (column_blocks + kScanBlocks - 1) / kScanBlocks;
  }
};

// First index of this thread in a loop over the whole grid, and the step to the next.
__device__ __forceinline__ int64_t grid_thread() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ __forceinline__ int64_t grid_threads() {
  return static_cast<int64_t>(gridDim.x) * blockDim.x;
}

// The counts of a group and a pair of tokens, by one thread: all loads are in flight at once.
__device__ __forceinline__ void scan_group(const PlaceHits& p, int64_t group, int64_t pair) {
  const int64_t pairs = p.tokens() / 2, first = group * kScanBlocks;
  uint32_t* counts = reinterpret_cast<uint32_t*>(p.tiles.counts) + first * pairs + pair;
  const int64_t left = p.column_blocks - first;
  uint32_t count[kScanBlocks];
#pragma unroll
  for (int b = 0; b < kScanBlocks; ++b) count[b] = b < left ? counts[b * pairs] : 0;
  uint32_t sum = 0;
#pragma unroll
  for (int b = 0; b < kScanBlocks; ++b) {
    if (b < left) counts[b * pairs] = sum;
    sum += count[b];
  }
  uint32_t* base = p.bases + group * 2 * pairs + 2 * pair;
  base[0] = sum & 0xffff;
  base[1] = sum >> 16;
}

// The groups of a token, by one warp: with few tokens there are many. Returns the token's entries; 0 beyond the last.
__device__ __forceinline__ int64_t scan_token(const PlaceHits& p, int64_t token) {
  if (token >= p.tiles.n) return 0;
  const int64_t tokens = p.tokens(), groups = p.groups(), lane = threadIdx.x % 32;
  uint32_t sum = 0;
  for (int64_t first = 0; first < groups; first += 32) {
    const int64_t group = first + lane;
    uint32_t* base = p.bases + group * tokens + token;
    const uint32_t count = group < groups ? *base : 0;
    uint32_t up_to = count;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t before = __shfl_up_sync(0xffffffffu, up_to, step);
      if (lane >= step) up_to += before;
    }
    if (group < groups) *base = sum + up_to - count;
    sum += __shfl_sync(0xffffffffu, up_to, 31);
  }
  const bool invalid = p.tiles.invalid != nullptr && p.tiles.invalid[token] > 0;
  return static_cast<int64_t>(sum) + invalid;
}

// A warp reads 128 bytes of each column block.
__global__ void __launch_bounds__(kPlaceThreads) scan_counts_kernel(PlaceHits p) {
  const int64_t pairs = p.tokens() / 2;
  for (int64_t item = grid_thread(); item < p.groups() * pairs; item += grid_threads()) {
    scan_group(p, item / pairs, item % pairs);
  }
}

__global__ void __launch_bounds__(kPlaceThreads) scan_groups_kernel(PlaceHits p) {
  for (int64_t token = grid_thread() / 32; token <= p.tiles.n; token += grid_threads() / 32) {
    const int64_t entries = scan_token(p, token);
    if (threadIdx.x % 32 == 0) p.offsets[token] = entries;
  }
}

// One block, n <= 16: counts to offsets.
__global__ void __launch_bounds__(kPlaceThreads) scan_few_kernel(PlaceHits p) {
  __shared__ int64_t entries[kStripTokens];
  const int64_t pairs = p.tokens() / 2;
  for (int64_t item = threadIdx.x; item < p.groups() * pairs; item += kPlaceThreads) {
    scan_group(p, item / pairs, item % pairs);
  }
  __syncthreads();
  for (int64_t token = threadIdx.x / 32; token < kStripTokens; token += kPlaceThreads / 32) {
    const int64_t own = scan_token(p, token);
    if (threadIdx.x % 32 == 0) entries[token] = own;
  }
  __syncthreads();
  if (threadIdx.x > p.tiles.n) return;
  int64_t before = 0;
  for (int64_t token = 0; token < threadIdx.x; ++token) before += entries[token];
  p.offsets[threadIdx.x] = before;
}

__global__ void __launch_bounds__(kPlaceThreads) limit_offsets_kernel(PlaceHits p) {
  for (int64_t i = grid_thread(); i <= p.tiles.n; i += grid_threads()) {
    const int64_t offset = p.offsets[i];
    if (i == p.tiles.n) *p.needed = offset;
    if (offset > p.capacity) p.offsets[i] = p.capacity;
  }
}

// Where the records of a run are; null when neither pass had room for them.
__device__ __forceinline__ const uint64_t* run_records(const EncodeTiles& p, uint64_t run) {
  const uint64_t begin = run & kRunBegin;
  if (begin + (run >> kRunCount) <= p.arena) return p.records + begin;
  return p.rest == nullptr ? nullptr : p.rest + (begin - p.rest_begin);
}

__device__ __forceinline__ int64_t strip_position(const PlaceHits& p, int64_t column_block,
                                                  int64_t token) {
  const int64_t group = column_block / kScanBlocks;
  return p.offsets[token] + p.bases[group * p.tokens() + token] +
         p.tiles.counts[column_block * p.tokens() + token];
}

// All that is read is on its way before the first store, which the compiler moves no load across.
__device__ __forceinline__ void place_record(const PlaceHits& p, uint64_t record,
                                             int64_t column_block, int64_t token0) {
  const int64_t token = token0 + (record >> kRecordToken & 15);
  const int32_t latent = static_cast<int32_t>(p.tiles.first + column_block * p.width) +
                         static_cast<int32_t>(record >> 32 & 255);
  // Without a window every record passes.
  const bool compares = p.gate != nullptr && p.tiles.window > 0.0f;
  const float threshold = compares ? p.tiles.threshold[latent] : 0.0f;
  int64_t at = strip_position(p, column_block, token) + static_cast<int64_t>(record >> kRecordRank);
  if (p.tiles.invalid != nullptr && latent > first_invalid(p.tiles, token)) ++at;
  if (at >= p.capacity) return;
  const float pre = __uint_as_float(static_cast<uint32_t>(record));
  p.indices[at] = latent;
  if (p.gate == nullptr) {
    p.values[at] = pre;
    return;
  }
  const bool active = !compares || pre > threshold;
  p.values[at] = active ? pre + 0.0f : 0.0f;  // -0.0 + 0.0 is 0.0
  p.gate[at] = active ? 1.0f : 0.0f;
}

// A few lanes per run: most runs have a few records, and all that is read of one waits for the last. The runs of a warp
// are those of one strip and successive column blocks: entries that lie side by side are written together.
__device__ __forceinline__ void place_runs(const PlaceHits& p) {
  const int64_t strips = p.strips();
  const int lane = static_cast<int>(threadIdx.x % kRunLanes);
  for (int64_t index = grid_thread() / kRunLanes; index < p.column_blocks * strips;
       index += grid_threads() / kRunLanes) {
    const int64_t strip = index / p.column_blocks, column_block = index % p.column_blocks;
    const uint64_t run = p.tiles.runs[column_block * strips + strip];
    const int count = static_cast<int>(run >> kRunCount);
    const uint64_t* records = run_records(p.tiles, run);
    if (records == nullptr) continue;
    uint64_t next = lane < count ? records[lane] : 0;
#pragma unroll 1
    for (int e = lane; e < count; e += kRunLanes) {
      const uint64_t record = next;
      if (e + kRunLanes < count) next = records[e + kRunLanes];  // while this one's place is read
      place_record(p, record, column_block, strip * kStripTokens);
    }
  }
}

// One thread per token; almost no token has an invalid latent.
__device__ __forceinline__ void insert_invalid(const PlaceHits& p) {
  for (int64_t token = grid_thread(); token < p.tiles.n; token += grid_threads()) {
    const int64_t latent = first_invalid(p.tiles, token);
    if (latent >= p.tiles.d_sae) continue;
    const int64_t column_block = (latent - p.tiles.first) / p.width;
    const uint64_t column = static_cast<uint64_t>((latent - p.tiles.first) % p.width);
    const uint64_t run = p.tiles.runs[column_block * p.strips() + token / kStripTokens];
    const uint64_t* records = run_records(p.tiles, run);
    if (records == nullptr && run >> kRunCount != 0) continue;
    int64_t at = strip_position(p, column_block, token);
    for (uint64_t e = 0; e < run >> kRunCount; ++e) {
      const bool own =
          (records[e] >> kRecordToken & 15) == static_cast<uint64_t>(token % kStripTokens);
      at += own && (records[e] >> 32 & 255) < column;
    }
    if (at >= p.capacity) continue;
    p.indices[at] = static_cast<int32_t>(latent);
    p.values[at] = __int_as_float(0x7fc00000);
    p.gate[at] = 1.0f;
  }
}

__device__ __forceinline__ void pad(const PlaceHits& p, bool lost) {
  if (p.gate == nullptr && !lost) return;  // candidates: nobody reads behind the last
  const int64_t begin = lost ? 0 : p.offsets[p.tiles.n];
  for (int64_t e = begin + grid_thread(); e < p.capacity; e += grid_threads()) {
    p.indices[e] = 0;
    p.values[e] = lost ? __int_as_float(0x7fc00000) : 0.0f;
    if (p.gate != nullptr) p.gate[e] = lost ? 1.0f : 0.0f;
  }
}

__global__ void __launch_bounds__(kPlaceThreads) pad_kernel(PlaceHits p) {
  pad(p, *p.needed > p.capacity);
}

// No two write the same entry: their order does not matter.
__global__ void __launch_bounds__(kPlaceThreads, kPlaceBlocks) place_kernel(PlaceHits p) {
  const bool lost = !p.exact && *p.needed > p.capacity;
  if (!lost) place_runs(p);
  if (!lost && p.tiles.invalid != nullptr) insert_invalid(p);
  pad(p, lost);
  if (p.exact && grid_thread() == 0) *p.needed = p.offsets[p.tiles.n];
}

// Grid for `size` items, one thread each; the kernels loop over the rest.
inline unsigned place_blocks(int64_t size) {
  const int64_t blocks = (size + kPlaceThreads - 1) / kPlaceThreads;
  return static_cast<unsigned>(blocks<1 ? 1 : blocks>(1 << 16) ? 1 << 16 : blocks);
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
