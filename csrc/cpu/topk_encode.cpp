// TopK encoder: the k largest of relu(x @ W_enc + b_enc) per row, exactly, without the matrix.
//
//   pre = x @ W_enc + b_enc;  k entries per row, NaN largest, ties to the smaller latent,
//   in ascending latent order
//   x [n, d_in], W_enc [d_in, d_sae], b_enc [d_sae]
//
// Source: Scaling and evaluating sparse autoencoders, arXiv 2406.04093, section 2.
// Algorithm: the k-th best value seen so far bounds a row from below, even when stale; only what
// exceeds it becomes a candidate. Candidates live in bounded buffers per (row, latent range), cut
// to the k best when full; ranges share the bound of a row. A last pass selects k of each row's
// survivors and fills up with zeros at the smallest latents.
// Bound: the dot products (fma ports); at n = 1 the read of W_enc.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <tuple>

#include "cpu/encode_output.h"
#include "cpu/encode_tiles.h"
#include "cpu/parallel.h"

namespace gemmascope_fast {
namespace {

constexpr char kOp[] = "topk_encode";
constexpr float kInf = std::numeric_limits<float>::infinity();

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

// Per row, the largest value that k entries are known to reach.
class SharedBounds {
 public:
  explicit SharedBounds(int64_t n) : bounds_(static_cast<size_t>(n)) {
    for (auto& bound : bounds_) bound.store(0.0f, std::memory_order_relaxed);
  }
  float get(int64_t row) const {
    return bounds_[static_cast<size_t>(row)].load(std::memory_order_relaxed);
  }
  void raise(int64_t row, float value) {
    auto& bound = bounds_[static_cast<size_t>(row)];
    float old = bound.load(std::memory_order_relaxed);
    while (old < value && !bound.compare_exchange_weak(old, value, std::memory_order_relaxed)) {
    }
  }

 private:
  std::vector<std::atomic<float>> bounds_;
};

// The candidates of one task: row r owns [begin[r], begin[r + 1]).
struct TaskCandidates {
  std::vector<int64_t> begin;
  std::vector<Candidate> candidates;
};

class Collector {
 public:
  Collector(const EncodeTiles& tiles, int64_t k, SharedBounds& shared)
      : k_(k),
        shared_(&shared),
        capacity_(std::min(tiles.range(), k > tiles.range() ? k : std::max(2 * k, k + 64))),
        buffer_(static_cast<size_t>(std::min(tiles.row_block(), tiles.rows()) * capacity_)) {}

  void start(const EncodeTiles::Task& task) {
    task_ = task;
    size_.assign(static_cast<size_t>(task.rows()), 0);
    bound_.assign(static_cast<size_t>(task.rows()), 0.0f);
  }

  // What does not exceed this can no longer be selected.
  float limit(int64_t row) const {
    return std::max(bound_[static_cast<size_t>(row - task_.row_begin)], others_limit(row));
  }

  void visit(int64_t row, int64_t latent, int64_t count, const int32_t* position,
             const float* pre) {
    const int64_t r = row - task_.row_begin;
    const size_t local = static_cast<size_t>(r);
    for (int64_t i = 0; i < count; ++i) {
      if (pre[i] <= bound_[local]) continue;  // the bound may have risen since
      if (size_[local] == capacity_) cut(row);
      row_buffer(r)[size_[local]++] = {pre[i], static_cast<int32_t>(latent) + position[i]};
    }
  }

  TaskCandidates finish() {
    TaskCandidates result;
    result.begin.reserve(size_.size() + 1);
    result.begin.push_back(0);
    for (int64_t r = 0; r < task_.rows(); ++r) {
      if (size_[static_cast<size_t>(r)] > k_) cut(task_.row_begin + r);
      result.begin.push_back(result.begin.back() + size_[static_cast<size_t>(r)]);
    }
    result.candidates.reserve(static_cast<size_t>(result.begin.back()));
    for (int64_t r = 0; r < task_.rows(); ++r) {
      const Candidate* row = row_buffer(r);
      result.candidates.insert(result.candidates.end(), row, row + size_[static_cast<size_t>(r)]);
    }
    return result;
  }

 private:
  Candidate* row_buffer(int64_t r) { return buffer_.data() + r * capacity_; }

  // Another range's entries may have larger latents: what equals its bound must stay.
  float others_limit(int64_t row) const {
    const float bound = shared_->get(row);
    return bound > 0 ? std::nextafter(bound, 0.0f) : 0.0f;
  }

  // Keeps the k best. Later latents lose ties against them, so the k-th best value itself is the
  // limit.
  void cut(int64_t row) {
    const size_t local = static_cast<size_t>(row - task_.row_begin);
    Candidate* first = row_buffer(row - task_.row_begin);
    std::nth_element(first, first + k_ - 1, first + size_[local], better);
    size_[local] = k_;
    const float value = first[k_ - 1].value;
    bound_[local] = std::isnan(value) ? kInf : value;  // beyond k NaN nothing but NaN is looked at
    shared_->raise(row, bound_[local]);
  }

  int64_t k_;
  SharedBounds* shared_;
  int64_t capacity_;
  EncodeTiles::Task task_{};
  std::vector<Candidate> buffer_;
  std::vector<int64_t> size_;
  std::vector<float> bound_;
};

std::vector<TaskCandidates> collect(EncodeTiles& tiles, const float* bias, int64_t k, int64_t n) {
  SharedBounds shared(n);
  std::vector<TaskCandidates> results(static_cast<size_t>(tiles.tasks()));
  std::vector<std::unique_ptr<Collector>> collectors(static_cast<size_t>(tiles.slots()));
  parallel_tasks(tiles.tasks(), tiles.slots(), [&](int64_t t, int64_t slot) {
    auto& collector = collectors[static_cast<size_t>(slot)];
    if (!collector) collector = std::make_unique<Collector>(tiles, k, shared);
    collector->start(tiles.task(t));
    const EncodeLimits limits = {bias, nullptr, [&](int64_t row) { return collector->limit(row); }};
    tiles.run(tiles.task(t), slot, limits,
              [&](int64_t row, int64_t latent, int64_t count, const int32_t* position,
                  const float* pre) { collector->visit(row, latent, count, position, pre); });
    results[static_cast<size_t>(t)] = collector->finish();
  });
  return results;
}

// Ascending latents; zeros at the smallest free latents where there are fewer than k.
void write_row(std::vector<Candidate>& row, int64_t k, int32_t* indices, float* values,
               float* gate) {
  if (static_cast<int64_t>(row.size()) > k) {
    std::nth_element(row.begin(), row.begin() + k - 1, row.end(), better);
    row.resize(static_cast<size_t>(k));
  }
  std::sort(row.begin(), row.end(),
            [](const Candidate& a, const Candidate& b) { return a.latent < b.latent; });
  int64_t zeros = k - static_cast<int64_t>(row.size()), latent = 0;
  size_t next = 0;
  for (int64_t e = 0; e < k; ++e, ++latent) {
    const bool positive = next < row.size() && (zeros == 0 || row[next].latent == latent);
    if (positive) latent = row[next].latent;
    indices[e] = static_cast<int32_t>(latent);
    values[e] = positive ? row[next].value : 0.0f;
    gate[e] = positive ? 1.0f : 0.0f;
    positive ? ++next : static_cast<size_t>(--zeros);
  }
}

void write_entries(const EncodeTiles& tiles, const std::vector<TaskCandidates>& tasks, int64_t n,
                   int64_t k, const EncodeOutput& out) {
  parallel_ranges(n, 16, [&](int64_t begin, int64_t end) {
    std::vector<Candidate> row;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / tiles.row_block() * tiles.ranges();
      const size_t local = static_cast<size_t>(i % tiles.row_block());
      row.clear();
      for (int64_t t = first; t < first + tiles.ranges(); ++t) {
        const TaskCandidates& task = tasks[static_cast<size_t>(t)];
        row.insert(row.end(), task.candidates.begin() + task.begin[local],
                   task.candidates.begin() + task.begin[local + 1]);
      }
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
    write_entries(tiles, collect(tiles, bias.data(), k, n), n, k, out);
  }
  auto [feature_offsets, permutation] = feature_view(by_feature, x, offsets, out.indices, d_sae);
  return {offsets, out.indices, out.values, out.gate, feature_offsets, permutation};
}

STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast, CPU, m) { GSF_CPU_IMPL(m, kOp, topk_encode_cpu); }

}  // namespace gemmascope_fast
