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

constexpr int64_t kDenseShare = 4;  // a direct block costs as much as rescoring a quarter of it
constexpr int64_t kRefined = 32;    // candidates of 16 latents that pay for laying their codes out
constexpr int64_t kPrefetchPanels = 4;  // with fewer rows most weights are not looked at again
constexpr int64_t kMostSkipped = 16;    // blocks computed directly before screening is tried again

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
  scratch.block = latent_block(begin, count, scratch);
  scratch.bounds = screen_latents(limits, scratch.block.stats, begin, count, tokens_->d());
  const ScreenTable& table = screens();
  const uint64_t real = (uint64_t{1} << count) - 1;
  const size_t most = static_cast<size_t>(task.rows() * count / kDenseShare);
  std::vector<Candidate>& found = scratch.candidates;
  found.clear();
  // Rescoring will want this block's weights, quantising the next block's: on the way while the products run.
  const int64_t panels = (task.rows() + kScreenRows - 1) / kScreenRows;
  const int64_t ahead = packed_ ? begin : begin + kScreenBlock;
  const int64_t wanted = std::clamp<int64_t>(task.latent_end - ahead, 0, kScreenBlock);
  for (int64_t row = task.row_begin; row < task.row_end; row += kScreenRows) {
    if (panels >= kPrefetchPanels && wanted > 0) {
      w_rows_.prefetch(ahead, wanted, (row - task.row_begin) / kScreenRows, panels);
    }
    const int64_t rows = std::min(kScreenRows, task.row_end - row);
    ScreenTokens tokens = tokens_->tokens(row);
    for (int64_t r = 0; limits.latent == nullptr && r < rows; ++r) {
      tokens.limit[r] = limits.row(row + r);
    }
    uint64_t masks[kScreenRows];
    int32_t products[kScreenRows * kScreenBlock];
    table.tile(scratch.block.codes, tokens_->codes(row), rows, tokens_->d(), scratch.bounds, tokens,
               masks, products);
    for (int64_t r = 0; r < rows; ++r) {
      for (uint64_t mask = masks[r] & real; mask != 0; mask &= mask - 1) {
        const int latent = __builtin_ctzll(mask);
        found.push_back({static_cast<int32_t>(row + r - task.row_begin), latent,
                         products[r * kScreenBlock + latent]});
      }
    }
    if (found.size() > most && task.rows() > kScreenRows) return false;
  }
  return true;
}

// The candidates of a latent that remain with the fine codes: their rows in scratch.rows, and how many.
int64_t EncodeTiles::refine(const Task& task, int64_t latent, const Candidate* found, int64_t size,
                            Scratch& scratch, const EncodeLimits& limits) {
  int32_t* rows = scratch.rows.data();
  for (int64_t i = 0; i < size; ++i) rows[i] = found[i].row;
  if (scratch.code_rows.empty()) return size;
  const int64_t d = tokens_->d();
  int32_t* dots = scratch.fine_dots.data();
  screens().fine_dots(scratch.code_rows.data() + latent % kGroupRows * d,
                      tokens_->fine_codes() + task.row_begin * d, rows, size, d, dots);
  int64_t left = 0;
  for (int64_t i = 0; i < size; ++i) {
    const int64_t row = task.row_begin + found[i].row;
    const float limit = limits.latent == nullptr ? limits.row(row) : 0.0f;
    rows[left] = found[i].row;
    left += may_pass(tokens_->fine(row), limit, scratch.bounds, latent, found[i].product, dots[i]);
  }
  return left;
}

// Canonical dots of the candidates, latent by latent.
void EncodeTiles::rescore(const Task& task, int64_t begin, int64_t count, Scratch& scratch,
                          const EncodeLimits& limits, const Visit& visit) {
  const std::vector<Candidate>& found = scratch.candidates;
  int64_t first[kScreenBlock + 1] = {}, place[kScreenBlock];
  for (const Candidate& c : found) ++first[c.latent + 1];
  for (int64_t l = 0; l < kScreenBlock; ++l) {
    place[l] = first[l];
    first[l + 1] += first[l];
  }
  scratch.sorted.resize(found.size());
  for (const Candidate& c : found) scratch.sorted[static_cast<size_t>(place[c.latent]++)] = c;
  scratch.rows.resize(found.size());
  scratch.fine_dots.resize(found.size());
  float* dots = scratch.dots.reserve(static_cast<int64_t>(found.size()));
  const float* x = x_ + task.row_begin * x_stride_;
  const bool whole = static_cast<int64_t>(found.size()) >= count / 4;
  int64_t stride = 0;
  const float* w = whole ? w_rows_.rows(begin, count, scratch.weights, &stride) : nullptr;
  for (int64_t l = 0; l < count; ++l) {
    if (l % kGroupRows == 0) {
      const bool fine = first[l + kGroupRows] - first[l] >= kRefined;
      scratch.code_rows.resize(fine ? static_cast<size_t>(kGroupRows * tokens_->d()) : 0);
      const uint8_t* codes = scratch.block.codes + l * tokens_->d();
      if (fine) codes_to_rows(codes, tokens_->d(), scratch.code_rows.data());
    }
    const int64_t size = first[l + 1] - first[l];
    if (size == 0) continue;
    const int64_t left = refine(task, l, scratch.sorted.data() + first[l], size, scratch, limits);
    if (left == 0) continue;
    scratch.rescored += left;
    const float* own =
        whole ? w + l * stride : w_rows_.rows(begin + l, 1, scratch.weights, &stride);
    const int32_t* rows = scratch.rows.data();
    table_.gather(x, x_stride_, rows, left, own, x_rows_.padded_cols(), dots);
    for (int64_t i = 0; i < left; ++i) {
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
