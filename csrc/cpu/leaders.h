// A running estimate, per row, of the k-th largest of all its values, while the row shows them.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <functional>
#include <mutex>
#include <vector>

namespace gemmascope_fast {

// Ranks in a part of a row's values, shown in an order that is none of theirs. Of the k largest of all, a part t holds
// Binomial(k, t), and r or more of them with a chance below exp(-k KL(r / k || t)) (Chernoff; sampling without replacement
// has the thinner tail). Where r is that unlikely, the part's r-th largest value is at most the k-th largest of all.
class SampleRanks {
 public:
  SampleRanks(int64_t k, int64_t total) : steps_(std::min(total, kSteps)), total_(total) {
    int64_t r = 1;
    for (int64_t step = 1; step <= steps_; ++step) {
      const double part = static_cast<double>(step) / static_cast<double>(steps_);
      while (r < k && divergence(r, k, part) < kLuck) ++r;
      ranks_.push_back(static_cast<size_t>(r));
    }
  }

  // The rank where `shown` of all have been shown, 0 < shown <= total; k at the end.
  size_t rank(int64_t shown) const {
    return ranks_[static_cast<size_t>(((shown - 1) * steps_) / total_)];
  }

 private:
  // k KL(r / k || part), 0 where r is no more than is expected.
  static double divergence(int64_t r, int64_t k, double part) {
    const double hit = static_cast<double>(r), all = static_cast<double>(k);
    if (hit <= all * part) return 0;
    return hit * std::log(hit / (all * part)) +
           (all - hit) * std::log((all - hit) / (all * (1 - part)));
  }

  static constexpr int64_t kSteps = 1024;
  static constexpr double kLuck = 16;  // 1 in 10^7 per look
  int64_t steps_, total_;
  std::vector<size_t> ranks_;
};

class Leaders {
 public:
  // Rows show their `total` values together, those of each row block in the same steps.
  Leaders(int64_t n, int64_t row_block, int64_t k, int64_t total)
      : ranks_(k, total),
        k_(static_cast<size_t>(k)),
        row_block_(row_block),
        shown_(static_cast<size_t>(n / row_block + 1)),
        values_(static_cast<size_t>(n)),
        bounds_(values_.size()) {
    for (std::atomic<int64_t>& shown : shown_) shown.store(0, std::memory_order_relaxed);
    for (std::atomic<float>& bound : bounds_) bound.store(0.0f, std::memory_order_relaxed);
  }

  // Never falls; 0 until a row has shown enough positive values. The k-th largest value is at least this, but for luck.
  float bound(int64_t row) const {
    return bounds_[static_cast<size_t>(row)].load(std::memory_order_relaxed);
  }

  // The rows of row's block are about to show `count` values.
  void show(int64_t row, int64_t count) {
    shown_[static_cast<size_t>(row / row_block_)].fetch_add(count, std::memory_order_relaxed);
  }

  void add(int64_t row, const float* values, int64_t count) {
    const float bound = this->bound(row);
    if (std::none_of(values, values + count, [&](float v) { return v > bound; })) return;
    std::lock_guard<std::mutex> lock(locks_[static_cast<size_t>(row) % kLocks]);
    std::vector<float>& own = values_[static_cast<size_t>(row)];
    for (int64_t i = 0; i < count; ++i) {
      if (values[i] > bound) own.push_back(values[i]);
    }
    const auto& shown = shown_[static_cast<size_t>(row / row_block_)];
    const size_t rank = ranks_.rank(shown.load(std::memory_order_relaxed));
    if (own.size() >= rank + std::max<size_t>(rank / 2, 4)) cut(row, own, rank);
  }

  // All values have been shown.
  void finish() {
    for (size_t row = 0; row < values_.size(); ++row) {
      if (values_[row].size() >= k_) cut(static_cast<int64_t>(row), values_[row], k_);
    }
  }

 private:
  void cut(int64_t row, std::vector<float>& own, size_t rank) {
    const auto last = own.begin() + static_cast<std::ptrdiff_t>(rank) - 1;
    std::nth_element(own.begin(), last, own.end(), std::greater<float>());
    std::atomic<float>& bound = bounds_[static_cast<size_t>(row)];
    bound.store(std::max(*last, bound.load(std::memory_order_relaxed)), std::memory_order_relaxed);
    own.resize(rank);
  }

  static constexpr size_t kLocks = 64;
  SampleRanks ranks_;
  size_t k_;
  int64_t row_block_;
  std::vector<std::atomic<int64_t>> shown_;
  std::vector<std::vector<float>> values_;
  std::vector<std::atomic<float>> bounds_;
  std::array<std::mutex, kLocks> locks_;
};

}  // namespace gemmascope_fast
