// The screened half of EncodeTiles: candidates by int8 products, decisions by canonical float32 dots.
//
// Algorithm: per block of 48 latents, quantised on the spot (cache-resident) or packed before: tiles of 8 rows list the
// entries that the bound lets through. A tile takes one chunk of d; all tiles of a chunk follow each other, so that the
// chunk's 12 KiB of latents stay in L1. The second stage looks at the candidates row by row, as they were found: a row's fine
// codes are read once, the block's codes lie in L2. What is left is sorted by latent and waits for the next block's product,
// during which its rows of W_enc are read; then it is rescored four dots at a time. Where more than a quarter are candidates
// the block is computed directly, and so are the next 1, 2, 4 ... blocks, up to 16, until one screens well again.
// Bound: the int8 products; then the rows of x and W_enc read by rescoring, from L3 and memory.
#include <algorithm>
#include <numeric>
#include <random>

#include "cpu/encode_tiles.h"

namespace gemmascope_fast {
namespace {

constexpr int64_t kDenseShare = 4;  // a direct block costs as much as rescoring a quarter of it
constexpr int64_t kRefined = 16;    // candidates of 16 latents that pay for laying their codes out
constexpr int64_t kRowsAtOnce = 256;  // of x, whose products of a chunk wait in L2 for the next one
constexpr int64_t kPanels = kRowsAtOnce / kScreenRows;
constexpr int64_t kMostSkipped = 16;  // blocks computed directly before screening is tried again
constexpr int64_t kLastShare =
    32;  // of the latents, the first ones, that part comes last in a random order

int64_t blocks_of(int64_t latents) { return (latents + kScreenBlock - 1) / kScreenBlock; }

}  // namespace

void EncodeTiles::shuffle() {
  const int64_t blocks = blocks_of(d_sae_), last = blocks / kLastShare;
  order_.resize(static_cast<size_t>(blocks));
  std::iota(order_.begin(), order_.end(), 0);
  std::rotate(order_.begin(), order_.begin() + last, order_.end());
  std::shuffle(order_.begin(), order_.end() - last, std::minstd_rand(1));
  visited_ = std::vector<std::atomic<int64_t>>(static_cast<size_t>(row_blocks_));
}

EncodeTiles::Block EncodeTiles::block_at(const Task& task, int64_t place) const {
  if (place >= task.latent_end) return {task.latent_end, 0};
  if (order_.empty()) return {place, std::min(kScreenBlock, task.latent_end - place)};
  const int64_t begin = order_[static_cast<size_t>(place / kScreenBlock)] * kScreenBlock;
  return {begin, std::min(kScreenBlock, d_sae_ - begin)};
}

LatentBlock EncodeTiles::latent_block(int64_t begin, int64_t count, Scratch& scratch) {
  if (packed_) return packed_->block(begin / kScreenBlock);
  LatentScratch& own = scratch.latents;
  own.codes.resize(static_cast<size_t>(kScreenBlock * tokens_->d()));
  own.stats.resize(static_cast<size_t>(kScreenBlock));
  own.scales.resize(static_cast<size_t>(kScreenBlock * screen_chunks(tokens_->d())));
  quantise_latents(w_rows_, begin, count, tokens_->center(), own, own.codes.data(),
                   own.stats.data(), own.scales.data());
  return {own.codes.data(), own.stats.data(), own.scales.data()};
}

// What the products of this block read on the way, a piece for every kScreenUnit elements of every tile: the rows of W_enc
// that the pending candidates want, and the next block's codes, or the weights they will be made of.
void EncodeTiles::read_ahead(const Task& task, Block next, Scratch& scratch) const {
  std::vector<const char*>& pieces = scratch.pieces;
  pieces.clear();
  const auto add = [&](Stretch stretch) {
    for (int64_t at = 0; at < stretch.bytes; at += kPiece) pieces.push_back(stretch.at + at);
  };
  int32_t last = -1;
  for (const Candidate& c : scratch.pending.entries) {
    if (packed_ && c.latent != last) add(w_rows_.stretch(scratch.pending.begin + c.latent, 1));
    last = c.latent;
  }
  if (!packed_) add(w_rows_.stretch(next.begin, next.count));
  if (packed_ && next.count > 0) {
    const LatentBlock block = packed_->block(next.begin / kScreenBlock);
    const auto* codes = reinterpret_cast<const char*>(block.codes);
    add({codes, kScreenBlock * tokens_->d()});
  }
  const int64_t panels = (task.rows() + kScreenRows - 1) / kScreenRows;
  const size_t places = static_cast<size_t>(panels * tokens_->d() / kScreenUnit);
  const auto* nothing = reinterpret_cast<const char*>(scratch.block.codes);
  scratch.ahead.assign(places, nothing);
  const size_t read = std::min(pieces.size(), places);
  for (size_t i = 0; i < read; ++i) scratch.ahead[i * places / read] = pieces[i];
}

// The products of rows [row, row + rows), rows <= kRowsAtOnce, with the block.
void EncodeTiles::multiply(int64_t row, int64_t rows, const EncodeLimits& limits,
                           const char* const* ahead, Scratch& scratch, uint64_t* masks) const {
  const int64_t d = tokens_->d(), width = screen_chunk(d);
  ScreenTokens tokens[kPanels];
  for (int64_t r = 0; r < rows; ++r) {
    ScreenTokens& own = tokens[r / kScreenRows];
    if (r % kScreenRows == 0) own = tokens_->tokens(row + r);
    if (limits.latent == nullptr) own.limit[r % kScreenRows] = limits.row(row + r);
  }
  float* products = scratch.products.reserve(kRowsAtOnce * kScreenBlock);
  const ScreenTable& table = tokens_->table();
  if (table.begin != nullptr) table.begin();
  for (int64_t chunk = 0; chunk < d / width; ++chunk) {
    for (int64_t r = 0; r < rows; r += table.rows) {
      const int64_t count = std::min(table.rows, rows - r);
      const ScreenTile tile = {
          scratch.block.codes, tokens_->codes(row + r), count, d, chunk, width, ahead};
      table.tile(tile, scratch.bounds, tokens[r / kScreenRows], masks + r,
                 products + r * kScreenBlock);
      ahead += (count + kScreenRows - 1) / kScreenRows * (width / kScreenUnit);
    }
  }
  if (table.end != nullptr) table.end();
}

// False when there are too many: then the list is incomplete.
bool EncodeTiles::find_candidates(const Task& task, Block own, Block next, Scratch& scratch,
                                  const EncodeLimits& limits) {
  const int64_t count = own.count;
  scratch.block = latent_block(own.begin, count, scratch);
  scratch.bounds = screen_latents(limits, scratch.block, own.begin, count, tokens_->d());
  read_ahead(task, next, scratch);
  const char* const* ahead = scratch.ahead.data();
  const uint64_t real = (uint64_t{1} << count) - 1;
  const size_t most = static_cast<size_t>(task.rows() * count / kDenseShare);
  std::vector<Candidate>& found = scratch.candidates;
  found.clear();
  for (int64_t row = task.row_begin; row < task.row_end; row += kRowsAtOnce) {
    const int64_t rows = std::min(kRowsAtOnce, task.row_end - row);
    uint64_t masks[kRowsAtOnce];
    multiply(row, rows, limits, ahead, scratch, masks);
    ahead += (rows + kScreenRows - 1) / kScreenRows * (tokens_->d() / kScreenUnit);
    const float* products = scratch.products.reserve(0);
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
  scratch.fine_pairs.clear();
  for (const Candidate& c : found) {
    if (of_group[c.latent / kGroupRows] < kRefined) continue;
    FinePair pair = tokens_->fine_pair(task.row_begin + c.row);
    pair.w = scratch.code_rows.data() + c.latent * d;
    pair.w_scale = scratch.block.scales + c.latent;
    scratch.fine_pairs.push_back(pair);
  }
  const int64_t count = static_cast<int64_t>(scratch.fine_pairs.size());
  const float* dot = scratch.fine_dots.reserve(count);
  tokens_->table().fine_dots(scratch.fine_pairs.data(), count, d, scratch.fine_dots.reserve(0));
  const double unit = fine_unit(tokens_->table().token_code);
  size_t left = 0;
  for (const Candidate c : found) {
    found[left++] = c;
    if (of_group[c.latent / kGroupRows] < kRefined) continue;
    const int64_t row = task.row_begin + c.row;
    const float limit = limits.latent == nullptr ? limits.row(row) : 0.0f;
    left -=
        !may_pass(tokens_->fine(row), limit, scratch.bounds, c.latent, c.product, *dot++ / unit);
  }
  found.resize(left);
}

// Makes the candidates pending, by latent, so that a row of W_enc is in L1 while the rows of x that want it pass by.
void EncodeTiles::sort_candidates(int64_t begin, int64_t count, Scratch& scratch) {
  size_t place[kScreenBlock + 1] = {};
  for (const Candidate& c : scratch.candidates) ++place[c.latent + 1];
  for (int64_t l = 0; l < kScreenBlock; ++l) place[l + 1] += place[l];
  scratch.pending.begin = begin;
  scratch.pending.count = count;
  scratch.pending.entries.resize(scratch.candidates.size());
  for (const Candidate& c : scratch.candidates) {
    scratch.pending.entries[place[c.latent]++] = c;
  }
}

// The rows of x and of W_enc that the candidates want, the latter converted where they are not float32 as they lie.
void EncodeTiles::pair_rows(const Task& task, Scratch& scratch) {
  const Pending& own = scratch.pending;
  const bool some = !w_rows_.in_place() && static_cast<int64_t>(own.entries.size()) < own.count / 4;
  int64_t stride = w_rows_.padded_cols();
  const float* w = some ? scratch.weights.reserve(own.count * stride)
                        : w_rows_.rows(own.begin, own.count, scratch.weights, &stride);
  scratch.pair_x.clear();
  scratch.pair_w.clear();
  int32_t last = -1;
  for (const Candidate& c : own.entries) {
    if (some && c.latent != last) {
      w_rows_.convert(own.begin + c.latent, 1, scratch.weights.reserve(0) + c.latent * stride);
    }
    last = c.latent;
    scratch.pair_x.push_back(x_ + (task.row_begin + c.row) * x_stride_);
    scratch.pair_w.push_back(w + c.latent * stride);
  }
}

// Canonical dots of the pending candidates.
void EncodeTiles::rescore(const Task& task, Scratch& scratch, const EncodeLimits& limits,
                          const Visit& visit) {
  std::vector<Candidate>& found = scratch.pending.entries;
  if (found.empty()) return;
  scratch.rescored += static_cast<int64_t>(found.size());
  pair_rows(task, scratch);
  float* dots = scratch.dots.reserve(static_cast<int64_t>(found.size()));
  table_.pairs(scratch.pair_x.data(), scratch.pair_w.data(), static_cast<int64_t>(found.size()),
               x_rows_.padded_cols(), dots);
  for (size_t i = 0; i < found.size(); ++i) {
    const int64_t row = task.row_begin + found[i].row;
    const int64_t latent = scratch.pending.begin + found[i].latent;
    const float pre = dots[i] + limits.bias[latent];
    const float limit = limits.latent == nullptr ? limits.row(row) : limits.latent[latent];
    const int32_t position = 0;
    if (!(pre <= limit)) visit(row, latent, 1, &position, &pre);
  }
  found.clear();
}

void EncodeTiles::count_visited(const Task& task, int64_t place, int64_t end) {
  if (order_.empty()) return;
  int64_t count = 0;
  for (; place < end; place += kScreenBlock) count += block_at(task, place).count;
  visited_[static_cast<size_t>(task.row_begin / row_block_)] += count;
}

// Blocks [place, end) of a task, all their dots.
void EncodeTiles::run_unscreened(const Task& task, int64_t place, int64_t end, Scratch& scratch,
                                 const EncodeLimits& limits, const Visit& visit) {
  if (order_.empty()) return run_direct(task, place, end, scratch, limits, visit);
  for (; place < end; place += kScreenBlock) {
    const auto [begin, count] = block_at(task, place);
    run_direct(task, begin, begin + count, scratch, limits, visit);
  }
}

void EncodeTiles::run_screened(const Task& task, Scratch& scratch, const EncodeLimits& limits,
                               const Visit& visit) {
  int64_t skip = 1;
  for (int64_t place = task.latent_begin; place < task.latent_end;) {
    const Block own = block_at(task, place);
    int64_t end = place + kScreenBlock;
    const bool screened = find_candidates(task, own, block_at(task, end), scratch, limits);
    rescore(task, scratch, limits, visit);
    if (screened) {
      skip = 1;
      ++scratch.screened_blocks;
      scratch.candidate_count += static_cast<int64_t>(scratch.candidates.size());
      refine(task, scratch, limits);
      sort_candidates(own.begin, own.count, scratch);
    } else {
      end = std::min(place + skip * kScreenBlock, task.latent_end);
      skip = std::min(2 * skip, kMostSkipped);
    }
    count_visited(task, place, end);
    if (!screened) run_unscreened(task, place, end, scratch, limits, visit);
    place = end;
  }
  rescore(task, scratch, limits, visit);
}

}  // namespace gemmascope_fast
