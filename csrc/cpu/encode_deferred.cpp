// Screening in two passes: proposals by int8 products against rising limits, canonical dots against the final ones.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "cpu/encode_tiles.h"

namespace gemmascope_fast {
namespace {

constexpr int64_t kFirstShare = 32;  // of the latents, that part comes last

}  // namespace

EncodeTiles::Block EncodeTiles::block_at(const Task& task, int64_t place) const {
  const int64_t begin = std::min(place, task.latent_end);
  return {begin, std::min(kScreenBlock, task.latent_end - begin)};
}

void EncodeTiles::shuffle() {
  const int64_t blocks = (d_sae_ + kScreenBlock - 1) / kScreenBlock;
  order_.resize(static_cast<size_t>(blocks));
  std::iota(order_.begin(), order_.end(), 0);
  std::rotate(order_.begin(), order_.begin() + blocks / kFirstShare, order_.end());
  std::shuffle(order_.begin(), order_.end() - blocks / kFirstShare, std::minstd_rand(1));
}

EncodeTiles::Block EncodeTiles::visited(const Task& task, int64_t place) const {
  if (place >= task.latent_end) return {task.latent_end, 0};
  const int64_t begin = order_[static_cast<size_t>(place / kScreenBlock)] * kScreenBlock;
  return {begin, std::min(kScreenBlock, d_sae_ - begin)};
}

void EncodeTiles::propose(const Task& task, int64_t slot, const EncodeLimits& limits,
                          Leaders& leaders, Budget& budget, Proposals& proposals) {
  Scratch& scratch = scratch_[static_cast<size_t>(slot)];
  // The errors of d codes on either side add up like independent ones, to margin / sqrt(2 d) or so: six times that.
  const float luck = std::min(1.0f, 4.25f / std::sqrt(static_cast<float>(tokens_->d())));
  for (int64_t j = task.latent_begin; j < task.latent_end; j += kScreenBlock) {
    if (budget.left < 0) return;
    const Block own = visited(task, j);
    find_candidates(task, own, visited(task, j + kScreenBlock), scratch, limits, true);
    leaders.show(task.row_begin, own.count);
    const LatentStats* stats = scratch.block.stats;
    if (!packed_) proposals.stats.insert(proposals.stats.end(), stats, stats + kScreenBlock);
    ++scratch.screened_blocks;
    scratch.candidate_count += static_cast<int64_t>(scratch.candidates.size());
    const std::vector<Candidate>& found = scratch.candidates;
    budget.left -= static_cast<int64_t>(found.size());
    const ScreenLatents& latents = scratch.bounds;
    float unit[kScreenBlock];
    for (int64_t l = 0; l < kScreenBlock; ++l) unit[l] = 1 / latents.slope[l];
    for (size_t i = 0; i < found.size();) {
      const int64_t row = task.row_begin + found[i].row, r = row % kScreenRows;
      const ScreenTokens& tokens = tokens_->tokens(row - r);
      const float a = luck * tokens.a[r], b = luck * tokens.b[r];
      float values[kScreenBlock];
      int64_t size = 0;
      for (const int32_t same = found[i].row; i < found.size() && found[i].row == same; ++i) {
        const int32_t l = found[i].latent;
        const float margin = a * latents.alpha[l] + b * latents.beta[l];
        const float value = (found[i].product - margin - latents.base[l]) * unit[l];
        // Base and slope are rounded down, by 2^-21: what a row of zeros, which has no margin, would show is too much.
        values[size++] = value - 0x1p-19f * (std::abs(value) + std::abs(latents.base[l] * unit[l]));
        proposals.entries.push_back({static_cast<uint16_t>(same),
                                     static_cast<uint16_t>(j + l - task.latent_begin),
                                     found[i].product});
      }
      leaders.add(row, values, size);
    }
  }
}

void EncodeTiles::decide(const Task& task, int64_t slot, const EncodeLimits& limits,
                         const Proposals& proposals, const Visit& visit) {
  Scratch& scratch = scratch_[static_cast<size_t>(slot)];
  const Proposal* next = proposals.entries.data();
  const Proposal* end = next + proposals.entries.size();
  for (int64_t j = task.latent_begin; j < task.latent_end; j += kScreenBlock) {
    const auto [begin, count] = visited(task, j);
    const int64_t first = j - task.latent_begin;
    // Codes that were made on the spot are gone: dots of more candidates cost less than making them again.
    scratch.block = packed_ ? latent_block(begin, count, scratch)
                            : LatentBlock{nullptr, proposals.stats.data() + first, nullptr};
    scratch.bounds = screen_latents(limits, scratch.block, begin, count, tokens_->d());
    scratch.candidates.clear();
    for (; next < end && next->latent < first + count; ++next) {
      const int64_t row = task.row_begin + next->row, l = next->latent - first;
      const ScreenTokens& tokens = tokens_->tokens(row / kScreenRows * kScreenRows);
      if (may_pass(tokens, row % kScreenRows, limits.row(row), scratch.bounds, l, next->product)) {
        scratch.candidates.push_back({next->row, static_cast<int32_t>(l), next->product});
      }
    }
    if (packed_) refine(task, scratch, limits);
    sort_candidates(begin, count, scratch);
    rescore(task, scratch, limits, visit);
  }
}

}  // namespace gemmascope_fast
