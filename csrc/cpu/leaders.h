// A running estimate, per row, of the k-th largest of what a row has shown.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <vector>

namespace gemmascope_fast {

class Leaders {
 public:
  Leaders(int64_t n, int64_t k)
      : k_(static_cast<size_t>(k)), values_(static_cast<size_t>(n)), bounds_(values_.size()) {
    for (std::atomic<float>& bound : bounds_) bound.store(0.0f, std::memory_order_relaxed);
  }

  // Never falls; 0 until a row has shown k positive values.
  float bound(int64_t row) const {
    return bounds_[static_cast<size_t>(row)].load(std::memory_order_relaxed);
  }

  void add(int64_t row, const float* values, int64_t count) {
    const float bound = this->bound(row);
    if (std::none_of(values, values + count, [&](float v) { return v > bound; })) return;
    std::lock_guard<std::mutex> lock(locks_[static_cast<size_t>(row) % kLocks]);
    std::vector<float>& own = values_[static_cast<size_t>(row)];
    for (int64_t i = 0; i < count; ++i) {
      if (!(values[i] > bound)) continue;
      own.push_back(values[i]);
      if (own.size() == 2 * k_) cut(row, own);
    }
  }

  // All values have been shown.
  void finish() {
    for (size_t row = 0; row < values_.size(); ++row) {
      if (values_[row].size() >= k_) cut(static_cast<int64_t>(row), values_[row]);
    }
  }

 private:
  void cut(int64_t row, std::vector<float>& own) {
    const auto last = own.begin() + static_cast<std::ptrdiff_t>(k_) - 1;
    std::nth_element(own.begin(), last, own.end(), std::greater<float>());
    bounds_[static_cast<size_t>(row)].store(*last, std::memory_order_relaxed);
    own.resize(k_);
  }

  static constexpr size_t kLocks = 64;
  size_t k_;
  std::vector<std::vector<float>> values_;
  std::vector<std::atomic<float>> bounds_;
  std::array<std::mutex, kLocks> locks_;
};

}  // namespace gemmascope_fast
