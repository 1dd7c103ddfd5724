// Lower bounds of the k-th largest of a row's values from a part of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
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
      ranks_.push_back(r);
    }
  }

  // The rank where `shown` of all have been shown, 0 < shown <= total; k at the end.
  int64_t rank(int64_t shown) const {
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
  std::vector<int64_t> ranks_;
};

}  // namespace gemmascope_fast
