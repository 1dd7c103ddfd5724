// Candidates that are held back until the limits have risen.
//
// Where limits are learnt on the way, the first of the latents meet low ones, and most of what they let through is ruled out by
// those that follow (TopK, k = 64 of 65,536: 359 dots a row if they are made at once, 161 in the end). What the codes say of a
// candidate is enough to raise the limits, so its float32 dot can wait for the end, when the rows of W_enc that are still wanted
// stream by. That is for AMX, whose products are over before such rows can be read meanwhile; behind `vpdpbusd` they are hidden,
// and holding costs 3 % there.
#include <algorithm>

#include "cpu/encode_tiles.h"

namespace gemmascope_fast {
namespace {

constexpr int64_t kFewRows =
    32;  // which do not share rows of W_enc, nor repay waking the threads again
constexpr int64_t kMostWanted = 256;  // entries of a row, of which nearly all candidates are some
constexpr int64_t kMostHeld = 512;    // of a row, in the mean
constexpr size_t kAtOnce = 2048;      // that are rescored together in the end

}  // namespace

bool EncodeTiles::holds(int64_t k) const {
  return hot_floats_ > 0 && n_ >= kFewRows && k <= kMostWanted;
}

// Of the oldest group, what may still pass becomes pending.
void EncodeTiles::release(Scratch& scratch, const EncodeLimits& limits) {
  const std::vector<Wanted>& oldest = scratch.held.groups.front();
  for (const Wanted& c : oldest) {
    if (c.most > limits.row(c.row)) scratch.pending.entries.push_back(c);
  }
  scratch.held.entries -= static_cast<int64_t>(oldest.size());
  scratch.held.groups.pop_front();
}

void EncodeTiles::hold(const Group& group, Scratch& scratch, const EncodeLimits& limits) {
  Held& held = scratch.held;
  sort_candidates(group, scratch, held.groups.emplace_back());
  held.entries += static_cast<int64_t>(scratch.candidates.size());
  while (held.entries > kMostHeld * row_block_) release(scratch, limits);
}

void EncodeTiles::finish(int64_t slot, const EncodeLimits& limits, const Visit& visit) {
  Scratch& scratch = scratch_[static_cast<size_t>(slot)];
  while (!scratch.held.groups.empty()) {
    release(scratch, limits);
    if (scratch.pending.entries.size() >= kAtOnce) rescore(scratch, limits, visit);
  }
  rescore(scratch, limits, visit);
}

}  // namespace gemmascope_fast
