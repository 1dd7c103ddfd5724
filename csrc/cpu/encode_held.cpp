// Candidates that are held back until the limits have risen.
//
// Where limits are learnt on the way, the first of the latents meet low ones, and most of what they let through is ruled out by
// those that follow (TopK, k = 64 of 65,536: 359 dots a row if they are made at once, 163 in the end). What the codes say of a
// candidate is enough to raise the limits, so its float32 dot can wait. With AMX all wait for the end, then their rows of W_enc
// stream by; elsewhere a quarter of the latents pass by, and the products of blocks go on hiding what is read.
#include <algorithm>

#include "cpu/encode_tiles.h"

namespace gemmascope_fast {
namespace {

// Of a thread's latents one in so many passes by, where products hide what rows are read.
constexpr int64_t kLagShare = 4;
constexpr int64_t kMostHeld = 512;  // entries of a row, in the mean
constexpr size_t kAtOnce = 2048;    // entries that are rescored together in the end

}  // namespace

// Of the oldest group, what may still pass becomes pending.
void EncodeTiles::release(Scratch& scratch, const EncodeLimits& limits, const Visit& visit) {
  if (!w_rows_.whole()) rescore(scratch, limits, visit);  // pending are of one block then
  const auto& [candidates, latents] = scratch.held.groups.front();
  for (const Wanted& c : candidates.entries) {
    if (c.most > limits.row(c.row)) scratch.pending.entries.push_back(c);
  }
  scratch.pending.last = candidates.last;
  scratch.held.entries -= static_cast<int64_t>(candidates.entries.size());
  scratch.held.latents -= latents;
  scratch.held.groups.pop_front();
}

// Latents that pass by before the candidates of one are rescored.
int64_t EncodeTiles::lag() const {
  if (!packed_) return 0;  // the weights that codes were made of are still in cache
  const int64_t all = d_sae_ * row_blocks_ / slots_;
  return tokens_->table().outruns_memory ? d_sae_ * row_blocks_ : all / kLagShare;
}

void EncodeTiles::hold(const Group& group, Scratch& scratch, const EncodeLimits& limits,
                       const Visit& visit) {
  Held& held = scratch.held;
  HeldGroup own = {{group.blocks[0], {}}, group.count * kScreenBlock};
  sort_candidates(group, scratch, own.candidates.entries);
  held.entries += static_cast<int64_t>(own.candidates.entries.size());
  held.latents += own.latents;
  held.groups.push_back(std::move(own));
  const int64_t most = kMostHeld * row_block_;
  while (held.latents > lag() || held.entries > most) release(scratch, limits, visit);
}

void EncodeTiles::finish(int64_t slot, const EncodeLimits& limits, const Visit& visit) {
  Scratch& scratch = scratch_[static_cast<size_t>(slot)];
  while (!scratch.held.groups.empty()) {
    release(scratch, limits, visit);
    if (scratch.pending.entries.size() >= kAtOnce) rescore(scratch, limits, visit);
  }
  rescore(scratch, limits, visit);
}

}  // namespace gemmascope_fast
