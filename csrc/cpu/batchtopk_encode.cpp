// BatchTopK encoder: the int(k * n) largest positive entries of relu(x @ W_enc + b_enc) over the
// whole batch, exactly.
//
//   pre = x @ W_enc + b_enc;  count = int(k * n) entries, ties by (row, latent), NaN largest
//   x [n, d_in], W_enc [d_in, d_sae], b_enc [d_sae]
//
// Source: BatchTopK sparse autoencoders, arXiv 2412.06410, section 3.
// Algorithm: one pool of candidates; whenever it is a quarter larger its r-th best becomes a lower bound for all tasks, valid
// even when stale. r is count, or where entries are screened the most of the count best that the part of the latents seen so
// far may hold, but for luck: n times TopK's rank (sample_ranks.h), for a latent has at most n of them, and sums of weights in
// [0, 1] obey the Chernoff bound of as many whole ones. count entries that reach the last bound prove it, else the pass is
// repeated without estimates. The order (value, row, latent) is total, so the outcome is the same whatever the schedule. A
// guess starts the bound, and is proved in the same way.
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
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
// Entries that a thread gathers before it adds them to the pool: few beside those to select, as they come without a bound.
constexpr int64_t kFewest = 32, kMost = 512;
constexpr int64_t kFew = 16;  // latents per selected one, from which a part of them tells enough

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

class Pool {
 public:
  // rank: of the best entries so far, which one's value is the next bound, 0 < rank() <= count.
  Pool(int64_t count, float bound, std::function<int64_t()> rank)
      : count_(count),
        share_(std::clamp(count / 32, kFewest, kMost)),
        next_(share_),
        rank_(std::move(rank)),
        bound_(bound) {}

  int64_t share() const { return share_; }

  // Nothing below the bound can be selected, if `finish` finds count entries.
  float bound() const { return bound_.load(std::memory_order_relaxed); }

  void add(std::vector<Entry>& entries) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const Entry& entry : entries) {
      if (entry.value < bound() || (cut_once_ && !better(entry, worst_))) continue;
      entries_.push_back(entry);
      if (size() >= next_) raise();
    }
    entries.clear();
  }

  // The count best, unordered; fewer where fewer reach the bound.
  std::vector<Entry>& finish() {
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
      const float value = select(rank).value;
      const float limit = std::isnan(value) ? std::numeric_limits<float>::infinity() : value;
      if (limit > bound()) bound_.store(limit, std::memory_order_relaxed);
      const auto below = [&](const Entry& entry) { return entry.value < limit; };
      entries_.erase(std::remove_if(entries_.begin() + rank, entries_.end(), below),
                     entries_.end());
    }
    next_ = size() + std::max(size() / 4, share_);
  }

  // Puts the rank best first and returns the last of them.
  const Entry& select(int64_t rank) {
    std::nth_element(entries_.begin(), entries_.begin() + rank - 1, entries_.end(), better);
    return entries_[static_cast<size_t>(rank - 1)];
  }

  int64_t count_, share_, next_;
  std::function<int64_t()> rank_;
  std::atomic<float> bound_;
  std::mutex mutex_;
  std::vector<Entry> entries_;
  Entry worst_{};
  bool cut_once_ = false;
};

// Entries below this cannot be selected; those equal to the bound may be, by their row.
float limit_of(const Pool& pool) {
  const float bound = pool.bound();
  return bound > 0 ? std::nextafter(bound, 0.0f) : 0.0f;
}

void collect(EncodeTiles& tiles, const float* bias, Pool& pool) {
  std::vector<std::vector<Entry>> found(static_cast<size_t>(tiles.slots()));
  const EncodeLimits limits = {bias, nullptr, [&](int64_t) { return limit_of(pool); }};
  const int64_t row_blocks = tiles.tasks() / std::max<int64_t>(tiles.ranges(), 1);
  parallel_tasks(tiles.tasks(), tiles.slots(), [&](int64_t t, int64_t slot) {
    std::vector<Entry>& own = found[static_cast<size_t>(slot)];
    // All row blocks of a range before the next one, so that they have seen about the same part of the latents.
    tiles.run(
        tiles.task(t % row_blocks * tiles.ranges() + t / row_blocks), slot, limits,
        [&](int64_t row, int64_t latent, int64_t count, const int32_t* position, const float* pre) {
          for (int64_t i = 0; i < count; ++i) {
            const float value = std::isnan(pre[i]) ? kNaN : pre[i];
            own.push_back({value, static_cast<int32_t>(latent) + position[i], row});
          }
          if (static_cast<int64_t>(own.size()) >= pool.share()) pool.add(own);
        });
    pool.add(own);
  });
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
  const auto full = [=](Pool& pool) { return static_cast<int64_t>(pool.finish().size()) == count; };
  if (guess && *guess > 0 && std::isfinite(static_cast<float>(*guess))) {
    Pool pool(count, static_cast<float>(*guess), all);
    collect(tiles, bias, pool);
    if (full(pool)) return std::move(pool.finish());
  }
  const int64_t n = tiles.rows(), k = (count + n - 1) / n;
  if (tiles.screened() && k <= tiles.latents() / kFew) {
    tiles.shuffle();
    const SampleRanks ranks(k, tiles.latents());
    Pool pool(count, 0.0f, [&] { return std::min(count, n * ranks.rank(visited(tiles))); });
    collect(tiles, bias, pool);
    if (full(pool) || pool.bound() == 0) return std::move(pool.finish());
  }
  Pool pool(count, 0.0f, all);
  collect(tiles, bias, pool);
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

float smallest(const std::vector<Entry>& entries) {
  if (entries.empty()) return 0.0f;
  return std::max_element(entries.begin(), entries.end(), better)->value;
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
