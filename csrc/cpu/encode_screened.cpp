// The screened half of EncodeTiles: candidates by int8 products, decisions by canonical float32 dots.
//
// Algorithm: per block of 48 latents, quantised on the spot (cache-resident) or packed before: tiles of 8 rows list the
// entries that the bound lets through; these are sorted by latent, so that a row of W_enc is in L1 while the rows of x that
// want it pass by. Where more than a quarter are candidates the block is computed directly, and so are the next 1, 2, 4 ...
// blocks, up to 16, until one screens well again.
// Bound: the int8 products; then the rows of x read by rescoring, candidates * d * 4 bytes from L2 and L3.
#include <algorithm>

#include "cpu/encode_tiles.h"

namespace gemmascope_fast {
namespace {

constexpr int64_t kDenseShare = 4;    // a direct block costs as much as rescoring a quarter of it
constexpr int64_t kMostSkipped = 16;  // blocks computed directly before screening is tried again

}  // namespace

LatentBlock EncodeTiles::latent_block(int64_t begin, int64_t count, Scratch& scratch) {
  if (packed_) return packed_->block(begin / kScreenBlock);
  LatentScratch& own = scratch.latents;
  own.codes.resize(static_cast<size_t>(kScreenBlock * tokens_->d()));
  own.stats.resize(static_cast<size_t>(kScreenBlock));
  quantise_latents(w_rows_, begin, count, tokens_->center(), own, own.codes.data(),
                   own.stats.data());
  return {own.codes.data(), own.stats.data()};
}

// False when there are too many: then the list is incomplete.
bool EncodeTiles::find_candidates(const Task& task, int64_t begin, int64_t count, Scratch& scratch,
                                  const EncodeLimits& limits) {
  const LatentBlock block = latent_block(begin, count, scratch);
  const ScreenLatents bounds = screen_latents(limits, block.stats, begin, count, tokens_->d());
  const ScreenTable& table = screens();
  const uint64_t real = (uint64_t{1} << count) - 1;
  const size_t most = static_cast<size_t>(task.rows() * count / kDenseShare);
  std::vector<Candidate>& found = scratch.candidates;
  found.clear();
  for (int64_t row = task.row_begin; row < task.row_end; row += kScreenRows) {
    const int64_t rows = std::min(kScreenRows, task.row_end - row);
    ScreenTokens tokens = tokens_->tokens(row);
    for (int64_t r = 0; limits.latent == nullptr && r < rows; ++r) {
      tokens.limit[r] = limits.row(row + r);
    }
    uint64_t masks[kScreenRows];
    table.tile(block.codes, tokens_->codes(row), rows, tokens_->d(), bounds, tokens, masks);
    for (int64_t r = 0; r < rows; ++r) {
      for (uint64_t mask = masks[r] & real; mask != 0; mask &= mask - 1) {
        found.push_back({static_cast<int32_t>(row + r - task.row_begin),
                         static_cast<int32_t>(__builtin_ctzll(mask))});
      }
    }
    if (found.size() > most && task.rows() > kScreenRows) return false;
  }
  return true;
}

// Canonical dots of the candidates, latent by latent.
void EncodeTiles::rescore(const Task& task, int64_t begin, int64_t count, Scratch& scratch,
                          const EncodeLimits& limits, const Visit& visit) {
  const std::vector<Candidate>& found = scratch.candidates;
  int64_t place[kScreenBlock + 1] = {};
  for (const Candidate& c : found) ++place[c.latent + 1];
  for (int64_t l = 0; l < count; ++l) place[l + 1] += place[l];
  scratch.sorted.resize(found.size());
  for (const Candidate& c : found) scratch.sorted[static_cast<size_t>(place[c.latent]++)] = c.row;
  float* dots = scratch.dots.reserve(static_cast<int64_t>(found.size()));
  const float* x = x_ + task.row_begin * x_stride_;
  const bool whole = static_cast<int64_t>(found.size()) >= count / 4;
  int64_t stride = 0;
  const float* w = whole ? w_rows_.rows(begin, count, scratch.weights, &stride) : nullptr;
  for (int64_t l = 0, from = 0; l < count; from = place[l++]) {
    const int64_t size = place[l] - from;
    if (size == 0) continue;
    const float* own =
        whole ? w + l * stride : w_rows_.rows(begin + l, 1, scratch.weights, &stride);
    const int32_t* rows = scratch.sorted.data() + from;
    table_.gather(x, x_stride_, rows, size, own, x_rows_.padded_cols(), dots);
    for (int64_t i = 0; i < size; ++i) {
      const int64_t row = task.row_begin + rows[i], latent = begin + l;
      const float pre = dots[i] + limits.bias[latent];
      const float limit = limits.latent == nullptr ? limits.row(row) : limits.latent[latent];
      const int32_t position = 0;
      if (!(pre <= limit)) visit(row, latent, 1, &position, &pre);
    }
  }
}

void EncodeTiles::run_screened(const Task& task, Scratch& scratch, const EncodeLimits& limits,
                               const Visit& visit) {
  int64_t skip = 1;
  for (int64_t j = task.latent_begin; j < task.latent_end;) {
    const int64_t count = std::min(kScreenBlock, task.latent_end - j);
    int64_t end = j + count;
    if (find_candidates(task, j, count, scratch, limits)) {
      skip = 1;
      ++scratch.screened_blocks;
      scratch.candidate_count += static_cast<int64_t>(scratch.candidates.size());
      rescore(task, j, count, scratch, limits, visit);
    } else {
      end = std::min(j + skip * kScreenBlock, task.latent_end);
      skip = std::min(2 * skip, kMostSkipped);
      run_direct(task, j, end, scratch, limits, visit);
    }
    j = end;
  }
}

}  // namespace gemmascope_fast
