// TopK encoder: the k largest of relu(x @ W_enc + b_enc) per row, exactly, without the matrix.
//
//   pre = x @ W_enc + b_enc;  k entries per row, NaN largest, ties to the smaller latent,
//   in ascending latent order
//   x [n, d_in], W_enc [d_in, d_sae], b_enc [d_sae]
//
// Source: Scaling and evaluating sparse autoencoders, arXiv 2406.04093, section 2.
// Algorithm: entries are screened in two passes: the int8 products alone estimate each row's k-th best value, by a rank in the
// part that was seen (leaders.h), and dots are computed only of what can exceed the final estimate. k entries that reach it
// prove it. Without screening, for a k that is no small part of the latents, or where the estimate fails, one pass follows the
// k-th best value seen so far, which bounds a row from below, even when stale: what exceeds it is a candidate; threads gather
// a few per row before they merge them into the row's k best, under a lock.
// A last pass orders each row and fills up with zeros at the smallest latents.
// Bound: the dot products (fma ports); at n = 1 the read of W_enc.
#include <torch/csrc/stable/library.h>

#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <mutex>
#include <tuple>

#include "cpu/encode_output.h"
#include "cpu/encode_tiles.h"
#include "cpu/leaders.h"
#include "cpu/parallel.h"

namespace gemmascope_fast {
namespace {

constexpr char kOp[] = "topk_encode";
constexpr int64_t kHeld = int64_t{4} << 20;  // proposals, 8 bytes each, that are always affordable
constexpr int64_t kFew =
    16;  // latents per selected one, from which a first pass rules enough of them out
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Candidate {
  float value;  // > 0 or NaN
  int32_t latent;
};

bool better(const Candidate& a, const Candidate& b) {
  const bool a_nan = std::isnan(a.value), b_nan = std::isnan(b.value);
  if (a_nan != b_nan) return a_nan;
  if (!a_nan && a.value != b.value) return a.value > b.value;
  return a.latent < b.latent;
}

// The largest float below a bound, where that is positive.
float below(float bound) { return bound > 0 ? std::nextafter(bound, 0.0f) : 0.0f; }

// The k best entries of every row so far, whoever found them. The order is total, so the outcome does not depend on the
// schedule; the k-th value bounds the row from below.
class BestEntries {
 public:
  BestEntries(int64_t n, int64_t k)
      : k_(k),
        best_(static_cast<size_t>(n * k)),
        size_(static_cast<size_t>(n)),
        bounds_(static_cast<size_t>(n)) {
    start([](int64_t) { return 0.0f; });
  }

  // Forgets all entries; what comes is known to be at least bound(row).
  template <typename Bound>
  void start(const Bound& bound) {
    for (size_t row = 0; row < size_.size(); ++row) {
      size_[row] = 0;
      bounds_[row].store(bound(static_cast<int64_t>(row)), std::memory_order_relaxed);
    }
  }

  // What does not exceed this can no longer be selected. An entry equal to the k-th may have a smaller latent.
  float limit(int64_t row) const {
    return below(bounds_[static_cast<size_t>(row)].load(std::memory_order_relaxed));
  }

  void merge(int64_t row, const Candidate* found, int64_t count, std::vector<Candidate>& work) {
    std::lock_guard<std::mutex> lock(locks_[static_cast<size_t>(row) % kLocks]);
    int64_t& size = size_[static_cast<size_t>(row)];
    Candidate* best = best_.data() + row * k_;
    work.assign(best, best + size);
    work.insert(work.end(), found, found + count);
    if (static_cast<int64_t>(work.size()) >= k_) {
      std::nth_element(work.begin(), work.begin() + k_ - 1, work.end(), better);
      work.resize(static_cast<size_t>(k_));
      const float value = work.back().value;
      const float bound = std::isnan(value) ? kInf : value;  // nothing but NaN beats k NaN
      bounds_[static_cast<size_t>(row)].store(bound, std::memory_order_relaxed);
    }
    std::copy(work.begin(), work.end(), best);
    size = static_cast<int64_t>(work.size());
  }

  const Candidate* begin(int64_t row) const { return best_.data() + row * k_; }
  const Candidate* end(int64_t row) const { return begin(row) + size_[static_cast<size_t>(row)]; }

 private:
  static constexpr size_t kLocks = 64;  // rows that share one rarely meet: two threads, few merges
  int64_t k_;
  std::vector<Candidate> best_;
  std::vector<int64_t> size_;
  std::vector<std::atomic<float>> bounds_;
  std::array<std::mutex, kLocks> locks_;
};

// One thread's candidates, merged a few at a time.
class Collector {
 public:
  Collector(const EncodeTiles& tiles, int64_t k, BestEntries& best)
      : best_(&best),
        capacity_(std::max<int64_t>(32, k / 2)),
        buffer_(static_cast<size_t>(std::min(tiles.row_block(), tiles.rows()) * capacity_)) {}

  void start(const EncodeTiles::Task& task) {
    task_ = task;
    size_.assign(static_cast<size_t>(task.rows()), 0);
  }

  void visit(int64_t row, int64_t latent, int64_t count, const int32_t* position,
             const float* pre) {
    const int64_t r = row - task_.row_begin;
    Candidate* own = buffer_.data() + r * capacity_;
    int64_t& size = size_[static_cast<size_t>(r)];
    for (int64_t i = 0; i < count; ++i) {
      own[size++] = {pre[i], static_cast<int32_t>(latent) + position[i]};
      if (size == capacity_) flush(r);
    }
  }

  void finish() {
    for (int64_t r = 0; r < task_.rows(); ++r) flush(r);
  }

 private:
  void flush(int64_t r) {
    int64_t& size = size_[static_cast<size_t>(r)];
    if (size > 0) best_->merge(task_.row_begin + r, buffer_.data() + r * capacity_, size, work_);
    size = 0;
  }

  BestEntries* best_;
  int64_t capacity_;
  EncodeTiles::Task task_{};
  std::vector<Candidate> buffer_, work_;
  std::vector<int64_t> size_;
};

using Run =
    std::function<void(int64_t task, int64_t slot, const EncodeLimits&, const EncodeTiles::Visit&)>;

// Merges what `run` visits, task by task.
void collect(const EncodeTiles& tiles, const float* bias, int64_t k, BestEntries& best,
             const Run& run) {
  std::vector<std::unique_ptr<Collector>> collectors(static_cast<size_t>(tiles.slots()));
  const EncodeLimits limits = {bias, nullptr, [&](int64_t row) { return best.limit(row); }};
  parallel_tasks(tiles.tasks(), tiles.slots(), [&](int64_t t, int64_t slot) {
    auto& collector = collectors[static_cast<size_t>(slot)];
    if (!collector) collector = std::make_unique<Collector>(tiles, k, best);
    collector->start(tiles.task(t));
    run(t, slot, limits,
        [&](int64_t row, int64_t latent, int64_t count, const int32_t* position, const float* pre) {
          collector->visit(row, latent, count, position, pre);
        });
    collector->finish();
  });
}

using Proposals = std::vector<EncodeTiles::Proposals>;  // of every task

// What the int8 products propose against each row's estimate, which rises meanwhile. Empty when that is too much to hold.
Proposals propose(EncodeTiles& tiles, const float* bias, Leaders& leaders) {
  Proposals proposals(static_cast<size_t>(tiles.tasks()));
  EncodeTiles::Budget budget = {std::max(kHeld, tiles.rows() * tiles.latents() / 8)};
  const EncodeLimits limits = {bias, nullptr,
                               [&](int64_t row) { return below(leaders.bound(row)); }};
  tiles.shuffle();
  parallel_tasks(tiles.tasks(), tiles.slots(), [&](int64_t t, int64_t slot) {
    tiles.propose(tiles.task(t), slot, limits, leaders, budget, proposals[static_cast<size_t>(t)]);
  });
  leaders.finish();
  if (budget.left < 0) proposals.clear();
  return proposals;
}

// Only what can exceed the final estimates becomes a dot. False where that does not settle it: too much was proposed, or a
// row's estimate was too high, so that less than k entries reach it.
bool collect_proposed(EncodeTiles& tiles, const float* bias, int64_t k, BestEntries& best) {
  Leaders leaders(tiles.rows(), tiles.row_block(), k, tiles.latents());
  const Proposals proposals = propose(tiles, bias, leaders);
  if (proposals.empty()) return false;
  best.start([&](int64_t row) { return leaders.bound(row); });
  collect(tiles, bias, k, best,
          [&](int64_t t, int64_t slot, const EncodeLimits& limits, const auto& visit) {
            tiles.decide(tiles.task(t), slot, limits, proposals[static_cast<size_t>(t)], visit);
          });
  for (int64_t row = 0; row < tiles.rows(); ++row) {
    if (leaders.bound(row) > 0 && best.end(row) - best.begin(row) < k) return false;
  }
  return true;
}

void select(EncodeTiles& tiles, const float* bias, int64_t k, BestEntries& best) {
  const bool few = k <= tiles.latents() / kFew;
  if (few && tiles.proposes() && collect_proposed(tiles, bias, k, best)) return;
  best.start([](int64_t) { return 0.0f; });
  collect(tiles, bias, k, best,
          [&](int64_t t, int64_t slot, const EncodeLimits& limits, const auto& visit) {
            tiles.run(tiles.task(t), slot, limits, visit);
          });
}

// Ascending latents; zeros at the smallest free latents where there are fewer than k.
void write_row(std::vector<Candidate>& row, int64_t k, int32_t* indices, float* values,
               float* gate) {
  std::sort(row.begin(), row.end(),
            [](const Candidate& a, const Candidate& b) { return a.latent < b.latent; });
  int64_t zeros = k - static_cast<int64_t>(row.size()), latent = 0;
  size_t next = 0;
  for (int64_t e = 0; e < k; ++e, ++latent) {
    const bool positive = next < row.size() && (zeros == 0 || row[next].latent == latent);
    if (positive) latent = row[next].latent;
    indices[e] = static_cast<int32_t>(latent);
    const float value = positive ? row[next].value : 0.0f;
    values[e] = std::isnan(value) ? kNaN : value;  // whose bits it had depends on the instructions
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
    BestEntries best(n, k);
    select(tiles, bias.data(), k, best);
    write_entries(best, n, k, out);
  }
  auto [feature_offsets, permutation] = feature_view(by_feature, x, offsets, out.indices, d_sae);
  return {offsets, out.indices, out.values, out.gate, feature_offsets, permutation};
}

STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast, CPU, m) { GSF_CPU_IMPL(m, kOp, topk_encode_cpu); }

}  // namespace gemmascope_fast
