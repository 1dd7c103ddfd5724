// The screened half of EncodeTiles: candidates by int8 products, decisions by canonical float32 dots.
//
// Algorithm: per block of 48 latents, quantised on the spot (cache-resident) or packed before: tiles of 8 rows list the
// entries that the bound lets through. The second stage looks at them row by row, as they were found: a row's fine codes
// are read once, the block's codes lie in L2. What is left is sorted by latent and rescored four dots at a time. Where more
// than a quarter are candidates the block is computed directly, and so are the next 1, 2, 4 ... blocks, up to 16, until one
// screens well again.
// Bound: the int8 products; then the rows of x and W_enc read by rescoring, from L3 and memory.
#include <algorithm>

#include "cpu/encode_tiles.h"

namespace gemmascope_fast {
namespace {

constexpr int64_t kDenseShare = 4;  // a direct block costs as much as rescoring a quarter of it
constexpr int64_t kRefined = 16;    // candidates of 16 latents that pay for laying their codes out
constexpr int64_t kLine = 64;       // bytes of a cache line
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
                                  const EncodeLimits& limits, bool all) {
  scratch.block = latent_block(begin, count, scratch);
  scratch.bounds = screen_latents(limits, scratch.block.stats, begin, count, tokens_->d());
  const ScreenTable& table = screens();
  const uint64_t real = (uint64_t{1} << count) - 1;
  const size_t most = static_cast<size_t>(task.rows() * count / (all ? 1 : kDenseShare));
  std::vector<Candidate>& found = scratch.candidates;
  found.clear();
  // The weights that will be quantised next are read on the way, while the products run.
  const int64_t panels = (task.rows() + kScreenRows - 1) / kScreenRows;
  const int64_t ahead = std::min(begin + kScreenBlock, task.latent_end);
  const Stretch next = w_rows_.stretch(ahead, std::min(kScreenBlock, task.latent_end - ahead));
  const int64_t share = next.bytes / panels, step = share / (tokens_->d() / 4) + 1;
  const bool reads = !packed_ && share > 0 && step <= kLine;
  for (int64_t row = task.row_begin; row < task.row_end; row += kScreenRows) {
    const int64_t rows = std::min(kScreenRows, task.row_end - row);
    ScreenTokens tokens = tokens_->tokens(row);
    for (int64_t r = 0; limits.latent == nullptr && r < rows; ++r) {
      tokens.limit[r] = limits.row(row + r);
    }
    uint64_t masks[kScreenRows];
    int32_t products[kScreenRows * kScreenBlock];
    const int64_t panel = (row - task.row_begin) / kScreenRows;
    const char* own = reinterpret_cast<const char*>(scratch.block.codes);
    const ReadAhead on_the_way =
        reads ? ReadAhead{next.at + panel * share, step} : ReadAhead{own, 0};
    table.tile(scratch.block.codes, tokens_->codes(row), rows, tokens_->d(), scratch.bounds, tokens,
               on_the_way, masks, products);
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

// Drops the candidates that the fine codes rule out, in the groups of latents that have enough of them.
void EncodeTiles::refine(const Task& task, Scratch& scratch, const EncodeLimits& limits) {
  std::vector<Candidate>& found = scratch.candidates;
  const int64_t d = tokens_->d();
  int64_t of_group[kScreenGroups] = {};
  for (const Candidate& c : found) ++of_group[c.latent / kGroupRows];
  scratch.code_rows.resize(static_cast<size_t>(kScreenBlock * d));
  for (int64_t g = 0; g < kScreenGroups; ++g) {
    const int64_t at = g * kGroupRows * d;
    if (of_group[g] >= kRefined) {
      codes_to_rows(scratch.block.codes + at, d, scratch.code_rows.data() + at);
    }
  }
  scratch.fine_w.clear();
  scratch.fine_x.clear();
  for (const Candidate& c : found) {
    if (of_group[c.latent / kGroupRows] < kRefined) continue;
    scratch.fine_w.push_back(scratch.code_rows.data() + c.latent * d);
    scratch.fine_x.push_back(tokens_->fine_codes() + (task.row_begin + c.row) * d);
  }
  scratch.fine_dots.resize(scratch.fine_w.size());
  screens().fine_dots(scratch.fine_w.data(), scratch.fine_x.data(),
                      static_cast<int64_t>(scratch.fine_w.size()), d, scratch.fine_dots.data());
  size_t left = 0;
  const int32_t* dot = scratch.fine_dots.data();
  for (const Candidate c : found) {
    found[left++] = c;
    if (of_group[c.latent / kGroupRows] < kRefined) continue;
    const int64_t row = task.row_begin + c.row;
    const float limit = limits.latent == nullptr ? limits.row(row) : 0.0f;
    left -= !may_pass(tokens_->fine(row), limit, scratch.bounds, c.latent, c.product, *dot++);
  }
  found.resize(left);
}

// Orders the candidates by latent, so that a row of W_enc is in L1 while the rows of x that want it pass by.
void EncodeTiles::sort_candidates(Scratch& scratch) {
  size_t place[kScreenBlock + 1] = {};
  for (const Candidate& c : scratch.candidates) ++place[c.latent + 1];
  for (int64_t l = 0; l < kScreenBlock; ++l) place[l + 1] += place[l];
  scratch.sorted.resize(scratch.candidates.size());
  for (const Candidate& c : scratch.candidates) scratch.sorted[place[c.latent]++] = c;
}

// The rows of x and of W_enc that the candidates want, the latter converted where they are not float32 as they lie.
void EncodeTiles::pair_rows(const Task& task, int64_t begin, int64_t count, Scratch& scratch) {
  const std::vector<Candidate>& found = scratch.sorted;
  const bool some = !w_rows_.in_place() && static_cast<int64_t>(found.size()) < count / 4;
  int64_t stride = w_rows_.padded_cols();
  const float* w = some ? scratch.weights.reserve(count * stride)
                        : w_rows_.rows(begin, count, scratch.weights, &stride);
  scratch.pair_x.clear();
  scratch.pair_w.clear();
  int32_t last = -1;
  for (const Candidate& c : found) {
    if (some && c.latent != last) {
      w_rows_.convert(begin + c.latent, 1, scratch.weights.reserve(0) + c.latent * stride);
    }
    last = c.latent;
    scratch.pair_x.push_back(x_ + (task.row_begin + c.row) * x_stride_);
    scratch.pair_w.push_back(w + c.latent * stride);
  }
}

// Canonical dots of the candidates that are left.
void EncodeTiles::rescore(const Task& task, int64_t begin, int64_t count, Scratch& scratch,
                          const EncodeLimits& limits, const Visit& visit) {
  refine(task, scratch, limits);
  sort_candidates(scratch);
  const std::vector<Candidate>& found = scratch.sorted;
  if (found.empty()) return;
  scratch.rescored += static_cast<int64_t>(found.size());
  pair_rows(task, begin, count, scratch);
  float* dots = scratch.dots.reserve(static_cast<int64_t>(found.size()));
  table_.pairs(scratch.pair_x.data(), scratch.pair_w.data(), static_cast<int64_t>(found.size()),
               x_rows_.padded_cols(), dots);
  for (size_t i = 0; i < found.size(); ++i) {
    const int64_t row = task.row_begin + found[i].row, latent = begin + found[i].latent;
    const float pre = dots[i] + limits.bias[latent];
    const float limit = limits.latent == nullptr ? limits.row(row) : limits.latent[latent];
    const int32_t position = 0;
    if (!(pre <= limit)) visit(row, latent, 1, &position, &pre);
  }
}

void EncodeTiles::run_screened(const Task& task, Scratch& scratch, const EncodeLimits& limits,
                               const Visit& visit) {
  int64_t skip = 1;
  for (int64_t j = task.latent_begin; j < task.latent_end;) {
    const int64_t count = std::min(kScreenBlock, task.latent_end - j);
    int64_t end = j + count;
    if (find_candidates(task, j, count, scratch, limits, false)) {
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
