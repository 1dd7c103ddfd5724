// TopK encoder: the k largest of relu(x @ W_enc + b_enc) per row, exactly, without the matrix.
//
//   pre = x @ W_enc + b_enc;  k entries per row, NaN largest, ties to the smaller latent,
//   in ascending latent order
//   x [n, d_in], W_enc [d_in, d_sae], b_enc [d_sae]
//
// Source: Scaling and evaluating sparse autoencoders, arXiv 2406.04093, section 2.
// Algorithm: only what exceeds the row's bound becomes a candidate. Threads gather a few per row before they merge them into the
// row's k best, under a lock. The k-th best seen so far is a bound, even when stale; where entries are screened a better one
// is the r-th best, r the most of the k best that the part seen so far may hold, but for luck (sample_ranks.h). k entries that
// reach it in the end prove it, else the k-th best serves in a second pass.
// A last pass orders each row and fills up with zeros at the smallest latents.
// Bound: the dot products (fma ports); at n = 1 the read of W_enc.
#include <torch/csrc/stable/library.h>

#include <array>
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

constexpr char kOp[] = "topk_encode";
constexpr int64_t kFew = 16;  // latents per selected one, from which a part of them tells enough
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// An entry, its value > 0 or NaN, as a number: the larger the better. For positive floats the order of the bits is that of the
// values, and NaN comes out largest; of equal values the smaller latent is better.
using Candidate = uint64_t;

Candidate candidate(float value, int32_t latent) {
  value = std::isnan(value) ? kNaN : value;  // whose bits it had depends on the instructions
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint64_t{bits} << 32 | ~static_cast<uint32_t>(latent);
}

float value_of(Candidate c) {
  const uint32_t bits = static_cast<uint32_t>(c >> 32);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

int32_t latent_of(Candidate c) { return static_cast<int32_t>(~static_cast<uint32_t>(c)); }

// The k best entries of every row so far, whoever found them, and a bound that rises with them. The order is total, so the
// outcome does not depend on the schedule.
class BestEntries {
 public:
  BestEntries(const EncodeTiles& tiles, int64_t k)
      : tiles_(&tiles),
        k_(k),
        best_(static_cast<size_t>(tiles.rows() * k)),
        size_(static_cast<size_t>(tiles.rows())),
        bounds_(size_.size()) {}

  // Without entries. ranks: of a part of the latents, or null: then bounds are no estimates.
  void start(const SampleRanks* ranks) {
    ranks_ = ranks;
    std::fill(size_.begin(), size_.end(), int64_t{0});
    for (std::atomic<float>& bound : bounds_) bound.store(0.0f, std::memory_order_relaxed);
  }

  // What does not exceed this need not be shown. An entry equal to the bound may have a smaller latent.
  float limit(int64_t row) const {
    const float bound = bounds_[static_cast<size_t>(row)].load(std::memory_order_relaxed);
    return bound > 0 ? std::nextafter(bound, 0.0f) : 0.0f;
  }

  // The rank-th best entry so far becomes the bound: with rank = k the best of the row are not below it; with a smaller one
  // they are not if it is `proved` in the end. Returns how many entries the row has now.
  int64_t merge(int64_t row, const Candidate* found, int64_t count, std::vector<Candidate>& work) {
    std::lock_guard<std::mutex> lock(locks_[static_cast<size_t>(row) % kLocks]);
    // Under the lock: what others have merged they had counted as visited.
    const int64_t rank = ranks_ == nullptr ? k_ : ranks_->rank(tiles_->visited(row));
    int64_t& size = size_[static_cast<size_t>(row)];
    Candidate* best = best_.data() + row * k_;
    work.assign(best, best + size);
    work.insert(work.end(), found, found + count);
    const bool more = static_cast<int64_t>(work.size()) > k_;
    size = more ? k_ : static_cast<int64_t>(work.size());
    auto from = work.begin();
    if (rank <= size) {
      std::nth_element(from, from + rank - 1, work.end(), std::greater<>());
      from += rank;
      raise(row, value_of(work[static_cast<size_t>(rank - 1)]));
    }
    if (more && rank != k_) {
      std::nth_element(from, work.begin() + k_ - 1, work.end(), std::greater<>());
    }
    std::copy(work.begin(), work.begin() + size, best);
    return size;
  }

  // Whether all rows have k entries that reach their bounds, or need none: nothing that was not shown can be better.
  bool proved() const {
    for (size_t row = 0; row < size_.size(); ++row) {
      const float bound = bounds_[row].load(std::memory_order_relaxed);
      const auto r = static_cast<int64_t>(row);
      const auto reaches = [&](Candidate c) { return !(value_of(c) < bound); };
      if (bound > 0 && (size_[row] < k_ || !std::all_of(begin(r), end(r), reaches))) return false;
    }
    return true;
  }

  const Candidate* begin(int64_t row) const { return best_.data() + row * k_; }
  const Candidate* end(int64_t row) const { return begin(row) + size_[static_cast<size_t>(row)]; }

 private:
  // Never falls: what was not shown before was below it.
  void raise(int64_t row, float value) {
    std::atomic<float>& bound = bounds_[static_cast<size_t>(row)];
    value = std::isnan(value) ? kInf : value;  // nothing but NaN beats NaN
    if (value > bound.load(std::memory_order_relaxed)) {
      bound.store(value, std::memory_order_relaxed);
    }
  }

  static constexpr size_t kLocks = 64;  // rows that share one rarely meet: two threads, few merges
  const EncodeTiles* tiles_;
  const SampleRanks* ranks_ = nullptr;
  int64_t k_;
  std::vector<Candidate> best_;
  std::vector<int64_t> size_;
  std::vector<std::atomic<float>> bounds_;
  std::array<std::mutex, kLocks> locks_;
};

// One thread's candidates, merged a few at a time.
class Collector {
 public:
  // early: also the first few, which raise a young bound by much.
  Collector(const EncodeTiles& tiles, int64_t k, bool early, BestEntries& best)
      : best_(&best),
        early_(early),
        capacity_(std::max<int64_t>(32, k / 2)),
        buffer_(static_cast<size_t>(std::min(tiles.row_block(), tiles.rows()) * capacity_)) {}

  void start(const EncodeTiles::Task& task) {
    task_ = task;
    size_.assign(static_cast<size_t>(task.rows()), 0);
    held_.assign(size_.size(), 0);
  }

  void visit(int64_t row, int64_t latent, int64_t count, const int32_t* position,
             const float* pre) {
    const int64_t r = row - task_.row_begin;
    Candidate* own = buffer_.data() + r * capacity_;
    int64_t& size = size_[static_cast<size_t>(r)];
    for (int64_t i = 0; i < count; ++i) {
      own[size++] = candidate(pre[i], static_cast<int32_t>(latent) + position[i]);
      if (size == capacity_) flush(r);
    }
    if (early_ && size >= kFewest + held_[static_cast<size_t>(r)] / 8) flush(r);
  }

  void finish() {
    for (int64_t r = 0; r < task_.rows(); ++r) flush(r);
  }

 private:
  void flush(int64_t r) {
    int64_t& size = size_[static_cast<size_t>(r)];
    if (size == 0) return;
    held_[static_cast<size_t>(r)] =
        best_->merge(task_.row_begin + r, buffer_.data() + r * capacity_, size, work_);
    size = 0;
  }

  static constexpr int64_t kFewest = 2;
  BestEntries* best_;
  bool early_;
  int64_t capacity_;
  EncodeTiles::Task task_{};
  std::vector<Candidate> buffer_, work_;
  std::vector<int64_t> size_, held_;
};

void collect(EncodeTiles& tiles, const float* bias, int64_t k, BestEntries& best,
             const SampleRanks* ranks) {
  std::vector<std::unique_ptr<Collector>> collectors(static_cast<size_t>(tiles.slots()));
  const EncodeLimits limits = {bias, nullptr, [&](int64_t row) { return best.limit(row); }};
  best.start(ranks);
  parallel_tasks(tiles.tasks(), tiles.slots(), [&](int64_t t, int64_t slot) {
    auto& collector = collectors[static_cast<size_t>(slot)];
    if (!collector) collector = std::make_unique<Collector>(tiles, k, ranks != nullptr, best);
    collector->start(tiles.task(t));
    tiles.run(tiles.task(t), slot, limits,
              [&](int64_t row, int64_t latent, int64_t count, const int32_t* position,
                  const float* pre) { collector->visit(row, latent, count, position, pre); });
    collector->finish();
  });
}

void select(EncodeTiles& tiles, const float* bias, int64_t k, BestEntries& best) {
  if (tiles.screened() && k <= tiles.latents() / kFew) {
    tiles.shuffle();
    const SampleRanks ranks(k, tiles.latents());
    collect(tiles, bias, k, best, &ranks);
    if (best.proved()) return;
  }
  collect(tiles, bias, k, best, nullptr);
}

// Ascending latents; zeros at the smallest free latents where there are fewer than k.
void write_row(std::vector<Candidate>& row, int64_t k, int32_t* indices, float* values,
               float* gate) {
  std::sort(row.begin(), row.end(),
            [](Candidate a, Candidate b) { return latent_of(a) < latent_of(b); });
  int64_t zeros = k - static_cast<int64_t>(row.size()), latent = 0;
  size_t next = 0;
  for (int64_t e = 0; e < k; ++e, ++latent) {
    const bool positive = next < row.size() && (zeros == 0 || latent_of(row[next]) == latent);
    if (positive) latent = latent_of(row[next]);
    indices[e] = static_cast<int32_t>(latent);
    values[e] = positive ? value_of(row[next]) : 0.0f;
    gate[e] = positive ? 1.0f : 0.0f;
    positive ? ++next : static_cast<size_t>(--zeros);
  }
}

void write_entries(const BestEntries& best, int64_t n, int64_t k, const EncodeOutput& out) {
  parallel_ranges(n, 16, [&](int64_t begin, int64_t end) {
    std::vector<Candidate> row;
    for (int64_t i = begin; i < end; ++i) {
      row.assign(best.begin(i), best.end(i));
      write_row(row, k, out.indices_data() + i * k, out.values_data() + i * k,
                out.gate_data() + i * k);
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> topk_encode_cpu(
    const Tensor& x, const Tensor& W_enc, const Tensor& b_enc, int64_t k, bool by_feature,
    std::optional<Tensor> packed) {
  check_encode(kOp, x, W_enc, b_enc);
  const int64_t n = x.size(0), d_sae = W_enc.size(1);
  if (k < 0 || k > d_sae) fail(kOp, "k must be in [0, d_sae=", d_sae, "], got ", k);

  Tensor offsets = new_tensor(x, {n + 1}, ScalarType::Long);
  for (int64_t i = 0; i <= n; ++i) static_cast<int64_t*>(offsets.data_ptr())[i] = i * k;
  const EncodeOutput out(x, n * k, n * k);
  if (n * k > 0) {
    const FloatVector bias(b_enc);
    EncodeTiles tiles(kOp, matrix_of(x), features(W_enc), packed_encoder(kOp, packed, W_enc));
    BestEntries best(tiles, k);
    select(tiles, bias.data(), k, best);
    write_entries(best, n, k, out);
  }
  auto [feature_offsets, permutation] = feature_view(by_feature, x, offsets, out.indices, d_sae);
  return {offsets, out.indices, out.values, out.gate, feature_offsets, permutation};
}

STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast, CPU, m) { GSF_CPU_IMPL(m, kOp, topk_encode_cpu); }

}  // namespace gemmascope_fast
