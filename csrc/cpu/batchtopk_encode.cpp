// BatchTopK encoder: the int(k * n) largest positive entries of relu(x @ W_enc + b_enc) over the
// whole batch, exactly.
//
//   pre = x @ W_enc + b_enc;  count = int(k * n) entries, ties by (row, latent), NaN largest
//   x [n, d_in], W_enc [d_in, d_sae], b_enc [d_sae]
//
// Source: BatchTopK sparse autoencoders, arXiv 2412.06410, section 3.
// Algorithm: one pool of entries; whenever it is a quarter larger its count-th best becomes a lower bound for all tasks, valid
// even when stale. Where entries are screened its r-th best is one: r is the most of the count best that the part of the latents
// seen so far may hold, but for luck: n times TopK's rank (sample_ranks.h), for a latent has at most n of them, and sums of
// weights in [0, 1] obey the Chernoff bound of as many whole ones. With AMX it is the r-th best of a second pool, of what the codes
// say of entries before their dots are made. count entries above the last limit prove it, else the pass is repeated without
// estimates. The order (value, row, latent) is total, so the outcome is the same whatever the schedule. A guess starts the bound,
// and is proved in the same way.
// Bound: the dot products (fma ports); at n = 1 the read of W_enc.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <mutex>
#include <tuple>

#include "cpu/encode_output.h"
#include "cpu/encode_tiles.h"
#include "cpu/parallel.h"
#include "cpu/sample_ranks.h"

namespace gemmascope_fast {
namespace {

constexpr char kOp[] = "batchtopk_encode";
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
// Entries that a thread gathers before it adds them to the pool: few beside those to select, as they come without a bound.
constexpr int64_t kFewest = 32, kMost = 512;
constexpr int64_t kFew = 16;  // latents per selected one, from which a part of them tells enough
// Standard deviations by which an entry is taken for smaller than its codes say.
constexpr float kSpread = 4;

struct Entry {
  float value;  // > 0 or the one NaN above
  int32_t latent;
  int64_t row;
};

// For positive floats the order of the bits is the order of the values, and NaN comes out largest.
uint32_t key(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

bool better(const Entry& a, const Entry& b) {
  if (key(a.value) != key(b.value)) return key(a.value) > key(b.value);
  return a.row != b.row ? a.row < b.row : a.latent < b.latent;
}

bool better(float a, float b) { return a > b; }
float value_of(const Entry& entry) { return entry.value; }
float value_of(float value) { return value; }

// The best of what was shown, at least `count` of them, and a bound that rises with them.
template <class T>
class Pool {
 public:
  // rank: of the best so far, which one's value is the next bound, 0 < rank() <= count.
  Pool(int64_t count, float bound, std::function<int64_t()> rank)
      : count_(count),
        share_(std::clamp(count / 32, kFewest, kMost)),
        next_(share_),
        rank_(std::move(rank)),
        bound_(bound) {}

  int64_t share() const { return share_; }
  float bound() const { return bound_.load(std::memory_order_relaxed); }

  void add(std::vector<T>& entries) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const T& entry : entries) {
      if (value_of(entry) < bound() || (cut_once_ && !better(entry, worst_))) continue;
      entries_.push_back(entry);
      if (size() >= next_) raise();
    }
    entries.clear();
  }

  // The count best, unordered; fewer where fewer reach the bound.
  std::vector<T>& finish() {
    cut();
    return entries_;
  }

 private:
  int64_t size() const { return static_cast<int64_t>(entries_.size()); }

  void cut() {
    if (size() <= count_) return;
    select(count_);
    entries_.resize(static_cast<size_t>(count_));
    worst_ = entries_.back();
    cut_once_ = true;
  }

  void raise() {
    cut();
    // Under the lock: what others have added they had counted as visited.
    const int64_t rank = rank_();
    if (rank <= size()) {
      const float value = value_of(select(rank));
      const float limit = std::isnan(value) ? kInf : value;
      if (limit > bound()) bound_.store(limit, std::memory_order_relaxed);
      const auto below = [&](const T& entry) { return value_of(entry) < limit; };
      entries_.erase(std::remove_if(entries_.begin() + rank, entries_.end(), below),
                     entries_.end());
    }
    next_ = size() + std::max(size() / 4, share_);
  }

  // Puts the rank best first and returns the last of them.
  const T& select(int64_t rank) {
    std::nth_element(entries_.begin(), entries_.begin() + rank - 1, entries_.end(),
                     [](const T& a, const T& b) { return better(a, b); });
    return entries_[static_cast<size_t>(rank - 1)];
  }

  int64_t count_, share_, next_;
  std::function<int64_t()> rank_;
  std::atomic<float> bound_;
  std::mutex mutex_;
  std::vector<T> entries_;
  T worst_{};
  bool cut_once_ = false;
};

// Entries at the bound may be selected, by their row: the limit is below it.
float limit_of(float bound) { return bound > 0 ? std::nextafter(bound, 0.0f) : 0.0f; }

// One thread's entries, added to the pools a few at a time.
class Collector {
 public:
  // likely: what is expected of entries before they are shown, or null.
  Collector(Pool<Entry>& pool, Pool<float>* likely) : pool_(&pool), likely_(likely) {}

  void visit(int64_t row, int64_t latent, int64_t count, const int32_t* position,
             const float* pre) {
    for (int64_t i = 0; i < count; ++i) {
      const float value = std::isnan(pre[i]) ? kNaN : pre[i];
      found_.push_back({value, static_cast<int32_t>(latent) + position[i], row});
    }
    if (static_cast<int64_t>(found_.size()) >= pool_->share()) pool_->add(found_);
  }

  void expect(float value, float deviation) {
    expected_.push_back(std::isnan(value) ? kInf : value - kSpread * deviation);
    if (static_cast<int64_t>(expected_.size()) >= likely_->share()) likely_->add(expected_);
  }

  void flush() {
    pool_->add(found_);
    if (likely_ != nullptr) likely_->add(expected_);
  }

 private:
  Pool<Entry>* pool_;
  Pool<float>* likely_;
  std::vector<Entry> found_;
  std::vector<float> expected_;
};

void collect(EncodeTiles& tiles, const float* bias, Pool<Entry>& pool, Pool<float>* likely) {
  std::vector<Collector> collectors(static_cast<size_t>(tiles.slots()), Collector(pool, likely));
  const auto limit = [&](int64_t) {
    return limit_of(std::max(pool.bound(), likely == nullptr ? 0.0f : likely->bound()));
  };
  // work(limits, visit)
  const auto with = [&](int64_t slot, const auto& work) {
    Collector& own = collectors[static_cast<size_t>(slot)];
    EncodeLimits limits = {bias, nullptr, limit};
    if (likely != nullptr) {
      limits.expect = [&](int64_t, float value, float deviation) { own.expect(value, deviation); };
    }
    work(limits, [&](int64_t row, int64_t latent, int64_t count, const int32_t* position,
                     const float* pre) { own.visit(row, latent, count, position, pre); });
    own.flush();
  };
  const int64_t row_blocks = tiles.tasks() / std::max<int64_t>(tiles.ranges(), 1);
  parallel_tasks(tiles.tasks(), tiles.slots(), [&](int64_t t, int64_t slot) {
    // All row blocks of a range before the next one, so that they have seen about the same part of the latents.
    const int64_t task = t % row_blocks * tiles.ranges() + t / row_blocks;
    with(slot, [&](const EncodeLimits& limits, const EncodeTiles::Visit& visit) {
      tiles.run(tiles.task(task), slot, limits, visit);
    });
  });
  if (likely == nullptr) return;
  parallel_tasks(tiles.slots(), [&](int64_t slot, int64_t) {
    with(slot, [&](const EncodeLimits& limits, const EncodeTiles::Visit& visit) {
      tiles.finish(slot, limits, visit);
    });
  });
}

float smallest(const std::vector<Entry>& entries) {
  if (entries.empty()) return 0.0f;
  return std::max_element(entries.begin(), entries.end(),
                          [](const Entry& a, const Entry& b) { return better(a, b); })
      ->value;
}

// The part of the latents that the row blocks have seen at most.
int64_t visited(const EncodeTiles& tiles) {
  int64_t most = 0;
  for (int64_t row = 0; row < tiles.rows(); row += tiles.row_block()) {
    most = std::max(most, tiles.visited(row));
  }
  return most;
}

std::vector<Entry> select(EncodeTiles& tiles, const float* bias, int64_t count,
                          std::optional<double> guess) {
  if (count == 0) return {};
  const auto all = [=] { return count; };
  // Whether count entries are above the limits that others were held to.
  const auto proved = [=](Pool<Entry>& pool, float limit) {
    const std::vector<Entry>& best = pool.finish();
    const bool full = static_cast<int64_t>(best.size()) == count;
    return limit == 0 || (full && !(smallest(best) <= limit));
  };
  if (guess && *guess > 0 && std::isfinite(static_cast<float>(*guess))) {
    Pool<Entry> pool(count, static_cast<float>(*guess), all);
    collect(tiles, bias, pool, nullptr);
    if (proved(pool, limit_of(pool.bound()))) return std::move(pool.finish());
  }
  float reached = 0;  // by count entries
  const int64_t n = tiles.rows(), k = (count + n - 1) / n;
  if (tiles.screened() && k <= tiles.latents() / kFew) {
    tiles.shuffle();
    const SampleRanks ranks(k, tiles.latents());
    const auto rank = [&] { return std::min(count, n * ranks.rank(visited(tiles))); };
    const bool holds = tiles.holds(k);
    Pool<Entry> pool(count, 0.0f, holds ? std::function<int64_t()>(all) : rank);
    Pool<float> likely(count, 0.0f, rank);
    collect(tiles, bias, pool, holds ? &likely : nullptr);
    const float limit = limit_of(std::max(pool.bound(), likely.bound()));
    if (proved(pool, limit)) return std::move(pool.finish());
    if (static_cast<int64_t>(pool.finish().size()) == count) reached = smallest(pool.finish());
  }
  Pool<Entry> pool(count, reached, all);
  collect(tiles, bias, pool, nullptr);
  return std::move(pool.finish());
}

// Rows by counting, then each row by latent.
void write_entries(const std::vector<Entry>& entries, int64_t n, int64_t* offsets,
                   const EncodeOutput& out) {
  std::fill(offsets, offsets + n + 1, int64_t{0});
  for (const Entry& entry : entries) ++offsets[entry.row + 1];
  for (int64_t i = 0; i < n; ++i) offsets[i + 1] += offsets[i];
  std::vector<int64_t> place(offsets, offsets + n);
  std::vector<std::pair<int32_t, float>> sorted(entries.size());
  for (const Entry& entry : entries) {
    sorted[static_cast<size_t>(place[static_cast<size_t>(entry.row)]++)] = {entry.latent,
                                                                            entry.value};
  }
  parallel_ranges(n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::sort(sorted.begin() + offsets[i], sorted.begin() + offsets[i + 1],
                [](const auto& a, const auto& b) { return a.first < b.first; });
    }
    for (int64_t e = offsets[begin]; e < offsets[end]; ++e) {
      out.indices_data()[e] = sorted[static_cast<size_t>(e)].first;
      out.values_data()[e] = sorted[static_cast<size_t>(e)].second;
      out.gate_data()[e] = 1.0f;
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> batchtopk_encode_cpu(
    const Tensor& x, const Tensor& W_enc, const Tensor& b_enc, double k,
    std::optional<double> guess, std::optional<int64_t> max_nnz, bool by_feature,
    std::optional<Tensor> packed) {
  check_encode(kOp, x, W_enc, b_enc);
  const int64_t n = x.size(0), d_sae = W_enc.size(1);
  if (!(k >= 0) || !std::isfinite(k)) fail(kOp, "k must be finite and >= 0, got ", k);
  if (max_nnz && *max_nnz < 0) fail(kOp, "max_nnz must be >= 0, got ", *max_nnz);

  const double wanted = std::trunc(k * static_cast<double>(n));
  const int64_t all = n * d_sae;
  const int64_t count = wanted >= static_cast<double>(all) ? all : static_cast<int64_t>(wanted);
  const FloatVector bias(b_enc);
  EncodeTiles tiles(kOp, matrix_of(x), features(W_enc), packed_encoder(kOp, packed, W_enc));
  const std::vector<Entry> entries = select(tiles, bias.data(), count, guess);

  const int64_t needed = static_cast<int64_t>(entries.size());
  const int64_t capacity = max_nnz.value_or(needed);
  if (needed > capacity) {
    throw std::runtime_error(
        "CapacityError: batchtopk_encode: max_nnz=" + std::to_string(capacity) + " is too small, " +
        std::to_string(needed) + " entries are needed; pass max_nnz >= " + std::to_string(needed));
  }
  Tensor offsets = new_tensor(x, {n + 1}, ScalarType::Long);
  const EncodeOutput out(x, capacity, needed);
  write_entries(entries, n, static_cast<int64_t*>(offsets.data_ptr()), out);
  const float threshold = static_cast<double>(needed) < wanted ? 0.0f : smallest(entries);
  auto [feature_offsets, permutation] = feature_view(by_feature, x, offsets, out.indices, d_sae);
  return {offsets,
          out.indices,
          out.values,
          out.gate,
          int64_scalar(x, needed),
          float_scalar(x, threshold),
          feature_offsets,
          permutation};
}

STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast, CPU, m) { GSF_CPU_IMPL(m, kOp, batchtopk_encode_cpu); }

}  // namespace gemmascope_fast
