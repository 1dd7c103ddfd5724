// The screened half of EncodeTiles: candidates by int8 products, decisions by canonical float32 dots.
//
// Algorithm: per block of 48 latents, quantised on the spot (cache-resident) or packed before: tiles of 8 rows list the
// entries that the bound lets through. A tile takes one chunk of d; all tiles of a chunk follow each other, so that the
// chunk's 12 KiB of latents stay in L1. The second stage looks at the candidates row by row, as they were found: a row's fine
// codes are read once, the block's codes lie in L2. What is left is sorted by latent and waits for the next block's product,
// during which its rows of W_enc are read; then it is rescored four dots at a time. Where more than a quarter are candidates
// the block is computed directly, and so are the next 1, 2, 4 ... blocks, up to 16, until one screens well again.
//   With AMX the product is too short to read anything meanwhile, and where x is larger than L2 (256 tokens of d = 5376 are 5.5
// MB) each block would read it from L3: as codes, as fine codes and as rows to rescore. Then up to 4 blocks are multiplied while
// a chunk of x is at hand, and 2048 candidates wait to be rescored together, part by part of d: a part of x stays in L2 while the
// candidates' rows of W_enc stream by. A group with a block of too many is done again block by block, as are the next ones.
// Bound: the int8 products; then the rows of x and W_enc read by rescoring, from L3 and memory.
#include <algorithm>
#include <limits>
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
constexpr int64_t kHotCodes = 1 << 20;  // bytes of latents that stay in L2 while tokens pass by
constexpr size_t kGathered = 2048;      // candidates that are rescored together
// The limit of a row of which nothing is wanted.
constexpr float kNever = std::numeric_limits<float>::infinity();

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t blocks_of(int64_t latents) { return divide_up(latents, kScreenBlock); }

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

EncodeTiles::Group EncodeTiles::group_at(const Task& task, int64_t place, bool alone) const {
  const int64_t fit = kHotCodes / (kScreenBlock * tokens_->d());
  const int64_t most = gathers() && !alone ? std::clamp<int64_t>(fit, 1, kMostBlocks) : 1;
  Group group;
  for (; group.count < most && place < task.latent_end; place += kScreenBlock) {
    group.blocks[group.count++] = block_at(task, place);
  }
  return group;
}

// What the products of a group read on the way, a piece for every kScreenUnit elements of every tile: the rows of W_enc that
// the pending candidates want, and the next group's codes, or the weights they will be made of.
void EncodeTiles::read_ahead(const Task& task, const Group& next, int64_t blocks,
                             Scratch& scratch) const {
  std::vector<const char*>& pieces = scratch.pieces;
  pieces.clear();
  const auto add = [&](Stretch stretch) {
    for (int64_t at = 0; at < stretch.bytes; at += kPiece) pieces.push_back(stretch.at + at);
  };
  int32_t last = -1;
  for (const Wanted& c : scratch.pending.entries) {
    if (packed_ && !gathers() && c.latent != last) add(w_rows_.stretch(c.latent, 1));
    last = c.latent;
  }
  for (int64_t b = 0; b < next.count; ++b) {
    const auto [begin, count] = next.blocks[b];
    if (!packed_) {
      add(w_rows_.stretch(begin, count));
      continue;
    }
    const LatentBlock block = packed_->block(begin / kScreenBlock);
    add({reinterpret_cast<const char*>(block.codes), kScreenBlock * tokens_->d()});
  }
  const int64_t panels = divide_up(task.rows(), kScreenRows);
  const size_t places = static_cast<size_t>(blocks * panels * tokens_->d() / kScreenUnit);
  const auto* nothing = reinterpret_cast<const char*>(scratch.codes[0].codes);
  scratch.ahead.assign(places, nothing);
  const size_t read = std::min(pieces.size(), places);
  for (size_t i = 0; i < read; ++i) scratch.ahead[i * places / read] = pieces[i];
}

// The products of rows [row, row + rows), rows <= kRowsAtOnce, with the blocks of a group, kRowsAtOnce rows a block.
void EncodeTiles::multiply(int64_t row, int64_t rows, int64_t blocks, const EncodeLimits& limits,
                           const char* const* ahead, Scratch& scratch, uint64_t* masks) const {
  const int64_t d = tokens_->d(), width = screen_chunk(d);
  ScreenTokens tokens[kPanels];
  for (int64_t r = 0; r < rows; ++r) {
    ScreenTokens& own = tokens[r / kScreenRows];
    if (r % kScreenRows == 0) own = tokens_->tokens(row + r);
    if (limits.latent == nullptr) own.limit[r % kScreenRows] = limits.row(row + r);
  }
  float* products = scratch.products.reserve(blocks * kRowsAtOnce * kScreenBlock);
  const ScreenTable& table = tokens_->table();
  const auto wanted = [&](int64_t first, int64_t count) {
    for (int64_t r = first; r < first + count; ++r) {
      if (tokens[r / kScreenRows].limit[r % kScreenRows] < kNever) return true;
    }
    return false;
  };
  if (table.begin != nullptr) table.begin();
  for (int64_t chunk = 0; chunk < d / width; ++chunk) {
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t r = 0; r < rows; r += table.rows) {
        const int64_t count = std::min(table.rows, rows - r), at = b * kRowsAtOnce + r;
        if (!wanted(r, count)) {
          std::fill_n(masks + at, count, uint64_t{0});
          continue;
        }
        const ScreenTile tile = {
            scratch.codes[b].codes, tokens_->codes(row + r), count, d, chunk, width, ahead};
        table.tile(tile, scratch.bounds[b], tokens[r / kScreenRows], masks + at,
                   products + at * kScreenBlock);
        ahead += divide_up(count, kScreenRows) * (width / kScreenUnit);
      }
    }
  }
  if (table.end != nullptr) table.end();
}

// False when there are too many in one of the blocks: then the list is incomplete.
bool EncodeTiles::find_candidates(const Task& task, const Group& own, const Group& next,
                                  Scratch& scratch, const EncodeLimits& limits) {
  uint64_t real[kMostBlocks] = {};
  int64_t of_block[kMostBlocks] = {};
  for (int64_t b = 0; b < own.count; ++b) {
    const auto [begin, count] = own.blocks[b];
    scratch.codes[b] = latent_block(begin, count, scratch);
    scratch.bounds[b] = screen_latents(limits, scratch.codes[b], begin, count, tokens_->d());
    real[b] = (uint64_t{1} << count) - 1;
  }
  read_ahead(task, next, own.count, scratch);
  const char* const* ahead = scratch.ahead.data();
  std::vector<Candidate>& found = scratch.candidates;
  found.clear();
  for (int64_t row = task.row_begin; row < task.row_end; row += kRowsAtOnce) {
    const int64_t rows = std::min(kRowsAtOnce, task.row_end - row);
    uint64_t masks[kMostBlocks * kRowsAtOnce];
    multiply(row, rows, own.count, limits, ahead, scratch, masks);
    ahead += own.count * divide_up(rows, kScreenRows) * (tokens_->d() / kScreenUnit);
    const float* products = scratch.products.reserve(0);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t b = 0; b < own.count; ++b) {
        const int64_t at = b * kRowsAtOnce + r;
        of_block[b] += __builtin_popcountll(masks[at] & real[b]);
        for (uint64_t mask = masks[at] & real[b]; mask != 0; mask &= mask - 1) {
          const int latent = __builtin_ctzll(mask);
          found.push_back({static_cast<int32_t>(row + r),
                           static_cast<int32_t>(b * kScreenBlock) + latent,
                           products[at * kScreenBlock + latent], 0.0f});
        }
      }
    }
    for (int64_t b = 0; b < own.count && task.rows() > kScreenRows; ++b) {
      if (of_block[b] > task.rows() * own.blocks[b].count / kDenseShare) return false;
    }
  }
  return true;
}

// Drops the candidates that the fine codes rule out, in the groups of 16 latents that have enough of them.
void EncodeTiles::refine(int64_t blocks, Scratch& scratch, const EncodeLimits& limits) {
  std::vector<Candidate>& found = scratch.candidates;
  const int64_t d = tokens_->d();
  int64_t of_group[kMostBlocks * kScreenGroups] = {};
  for (const Candidate& c : found) ++of_group[c.latent / kGroupRows];
  scratch.code_rows.resize(static_cast<size_t>(blocks * kScreenBlock * d));
  for (int64_t g = 0; g < blocks * kScreenGroups; ++g) {
    if (of_group[g] < kRefined) continue;
    codes_to_rows(scratch.codes[g / kScreenGroups].codes + g % kScreenGroups * kGroupRows * d, d,
                  scratch.code_rows.data() + g * kGroupRows * d);
  }
  scratch.fine_pairs.clear();
  for (const Candidate& c : found) {
    if (of_group[c.latent / kGroupRows] < kRefined) continue;
    FinePair pair = tokens_->fine_pair(c.row);
    pair.w = scratch.code_rows.data() + c.latent * d;
    pair.w_scale = scratch.codes[c.latent / kScreenBlock].scales + c.latent % kScreenBlock;
    scratch.fine_pairs.push_back(pair);
  }
  const int64_t count = static_cast<int64_t>(scratch.fine_pairs.size());
  const float* dot = scratch.fine_dots.reserve(count);
  tokens_->table().fine_dots(scratch.fine_pairs.data(), count, d, scratch.fine_dots.reserve(0));
  const double unit = fine_unit(tokens_->table().token_code);
  const ReachScale scale(d);
  size_t left = 0;
  for (Candidate c : found) {
    const bool refined = of_group[c.latent / kGroupRows] >= kRefined;
    if (!refined && !limits.expect) {
      found[left++] = c;
      continue;
    }
    const ScreenLatents& latents = scratch.bounds[c.latent / kScreenBlock];
    const int64_t l = c.latent % kScreenBlock, at = c.row % kScreenRows;
    const ScreenBound bound =
        refined ? fine_bound(tokens_->fine(c.row), latents, l, c.product, *dot++ / unit)
                : coarse_bound(tokens_->tokens(c.row), at, latents, l, c.product);
    const float limit = limits.latent == nullptr ? limits.row(c.row) : 0.0f;
    if (refined && !may_pass(bound, limit, latents, l)) continue;
    if (limits.expect) {
      const Reach reach = reach_of(bound, scale, latents, l);
      c.most = reach.most;
      // The deviation is NaN of a latent of zeros and a row out of range.
      const bool known = reach.deviation < kNever && reach.near > limit;
      if (known) limits.expect(c.row, reach.near, reach.deviation);
    }
    found[left++] = c;
  }
  found.resize(left);
}

// Appends the candidates by latent, so that a row of W_enc is in L1 while the rows of x that want it pass by.
void EncodeTiles::sort_candidates(const Group& group, Scratch& scratch,
                                  std::vector<Wanted>& target) {
  size_t place[kMostBlocks * kScreenBlock + 1] = {target.size()};
  const int64_t latents = group.count * kScreenBlock;
  for (const Candidate& c : scratch.candidates) ++place[c.latent + 1];
  for (int64_t l = 0; l < latents; ++l) place[l + 1] += place[l];
  target.resize(target.size() + scratch.candidates.size());
  for (const Candidate& c : scratch.candidates) {
    target[place[c.latent]++] = {c.row, static_cast<int32_t>(group.latent(c.latent)), c.most};
  }
}

// The rows of x and of W_enc that the candidates want, the latter converted where they do not lie as rows.
void EncodeTiles::pair_rows(Scratch& scratch) {
  const Pending& own = scratch.pending;
  const auto [begin, count] = own.last;
  const bool whole = w_rows_.whole();
  const bool some = !whole && static_cast<int64_t>(own.entries.size()) < count / 4;
  const int64_t stride = w_rows_.padded_cols();
  float* converted = whole ? nullptr : scratch.weights.reserve(count * stride);
  if (!whole && !some) w_rows_.convert(begin, count, converted);
  scratch.pair_x.clear();
  scratch.pair_w.clear();
  int32_t last = -1;
  for (const Wanted& c : own.entries) {
    float* row = whole ? nullptr : converted + (c.latent - begin) * stride;
    if (some && c.latent != last) w_rows_.convert(c.latent, 1, row);
    last = c.latent;
    scratch.pair_x.push_back(x_ + c.row * x_stride_);
    scratch.pair_w.push_back(whole ? w_rows_.row(c.latent) : row);
  }
}

// Canonical dots of the pending candidates.
void EncodeTiles::rescore(Scratch& scratch, const EncodeLimits& limits, const Visit& visit) {
  std::vector<Wanted>& found = scratch.pending.entries;
  if (found.empty()) return;
  const int64_t count = static_cast<int64_t>(found.size()), d = x_rows_.padded_cols();
  scratch.rescored += count;
  pair_rows(scratch);
  const int64_t parts = gathers() ? divide_up(row_block_ * d, hot_floats_) : 1;
  const int64_t width = divide_up(divide_up(d, parts), 16) * 16;
  float* dots = scratch.dots.reserve(count);
  table_.pairs(scratch.pair_x.data(), scratch.pair_w.data(), w_rows_.whole() ? w_rows_.dtype() : 0,
               count, d, width, scratch.state.reserve(count * 16), dots);
  for (size_t i = 0; i < found.size(); ++i) {
    const int64_t row = found[i].row, latent = found[i].latent;
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
  const Visit known = [&](int64_t row, int64_t latent, int64_t count, const int32_t* position,
                          const float* pre) {
    for (int64_t i = 0; i < count && limits.expect; ++i) limits.expect(row, pre[i], 0.0f);
    visit(row, latent, count, position, pre);
  };
  for (; place < end; place += kScreenBlock) {
    const auto [begin, count] = block_at(task, place);
    run_direct(task, begin, begin + count, scratch, limits, known);
  }
}

// What the tiles found in a group: some are ruled out, the others become pending, now or later.
void EncodeTiles::keep_candidates(const Group& group, Scratch& scratch,
                                  const EncodeLimits& limits) {
  scratch.screened_blocks += group.count;
  scratch.candidate_count += static_cast<int64_t>(scratch.candidates.size());
  refine(group.count, scratch, limits);
  if (limits.expect) return hold(group, scratch, limits);
  sort_candidates(group, scratch, scratch.pending.entries);
  scratch.pending.last = group.blocks[0];
}

void EncodeTiles::run_screened(const Task& task, Scratch& scratch, const EncodeLimits& limits,
                               const Visit& visit) {
  int64_t skip = 1, alone = task.latent_begin;  // until there, blocks go one by one
  for (int64_t place = task.latent_begin; place < task.latent_end;) {
    const Group own = group_at(task, place, place < alone);
    int64_t end = place + own.count * kScreenBlock;
    const Group next = group_at(task, end, end < alone);
    const bool screened = find_candidates(task, own, next, scratch, limits);
    if (!screened && own.count > 1) {
      alone = place + kMostSkipped * kScreenBlock;
      continue;
    }
    if (!screened || !gathers() || scratch.pending.entries.size() >= kGathered) {
      rescore(scratch, limits, visit);
    }
    if (!screened) {
      end = std::min(place + skip * kScreenBlock, task.latent_end);
      skip = std::min(2 * skip, kMostSkipped);
    }
    count_visited(task, place, end);
    if (screened) {
      skip = 1;
      keep_candidates(own, scratch, limits);
    } else {
      run_unscreened(task, place, end, scratch, limits, visit);
    }
    place = end;
  }
  rescore(scratch, limits, visit);
}

}  // namespace gemmascope_fast
