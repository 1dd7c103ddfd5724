// JumpReLU encoder: the entries of x @ W_enc + b_enc that pass a threshold, as CSR.
//
//   pre = x @ W_enc + b_enc;  entry (i, j) when pre > threshold[j] (value pre, gate 1)
//   or, with bandwidth > 0, when pre > threshold[j] - bandwidth / 2 (value 0, gate 0)
//   x [n, d_in], W_enc [d_in, d_sae], b_enc and threshold [d_sae]
//
// Source: JumpReLU SAEs, arXiv 2407.14435, section 3.
// Algorithm: each (row block, latent range) task keeps what exceeds one limit per latent (encode_tiles.h) as 8-byte records
// with a count per row. A prefix sum over (row,
// range) then gives every task the place of its entries in the CSR, which all tasks write
// independently: the result cannot depend on the schedule.
// Bound: the dot products (fma ports); at n = 1 the read of W_enc.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <tuple>

#include "cpu/encode_output.h"
#include "cpu/encode_tiles.h"
#include "cpu/parallel.h"

namespace gemmascope_fast {
namespace {

constexpr char kOp[] = "jumprelu_encode";
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Row and latent relative to their task (EncodeTiles::kMaxSide). An invalid entry has the value NaN.
struct Record {
  uint16_t row, latent;
  float value;
};
static_assert(EncodeTiles::kMaxSide <= 65536);
static_assert(sizeof(Record) == 8, "half the result's size at most");

// Append-only, in pieces, because doubling one array would hold three times the records.
class RecordList {
 public:
  void push(Record record) {
    if (pieces_.empty() || used_ == capacity_) grow();
    pieces_.back()[used_++] = record;
  }
  template <typename Body>
  void for_each(const Body& body) const {
    for (size_t p = 0; p < pieces_.size(); ++p) {
      const int64_t size = p + 1 < pieces_.size() ? capacity_of(p) : used_;
      for (int64_t i = 0; i < size; ++i) body(pieces_[p][i]);
    }
  }

 private:
  static int64_t capacity_of(size_t piece) { return int64_t{256} << std::min<size_t>(piece, 8); }
  void grow() {
    capacity_ = capacity_of(pieces_.size());
    pieces_.emplace_back(new Record[static_cast<size_t>(capacity_)]);
    used_ = 0;
  }

  std::vector<std::unique_ptr<Record[]>> pieces_;
  int64_t used_ = 0, capacity_ = 0;
};

struct TaskEntries {
  RecordList records;
  std::vector<int64_t> place;  // per row: entries, later the position of the next one
  std::vector<char> invalid;   // per row: 1 when an invalid latent is among them
};

class Collector {
 public:
  explicit Collector(const float* threshold) : threshold_(threshold) {}

  void start(const EncodeTiles::Task& task, TaskEntries& entries) {
    task_ = task;
    entries_ = &entries;
    entries.place.assign(static_cast<size_t>(task.rows()), 0);
    entries.invalid.assign(static_cast<size_t>(task.rows()), 0);
  }

  void visit(int64_t row, int64_t latent, int64_t count, const int32_t* position,
             const float* pre) {
    for (int64_t i = 0; i < count; ++i) keep(row - task_.row_begin, latent + position[i], pre[i]);
  }

 private:
  void keep(int64_t row, int64_t latent, float pre) {
    if (std::isnan(pre) || std::isnan(threshold_[latent])) {
      char& invalid = entries_->invalid[static_cast<size_t>(row)];
      if (invalid != 0) return;
      invalid = 1;
      pre = kNaN;
    }
    entries_->records.push(
        {static_cast<uint16_t>(row), static_cast<uint16_t>(latent - task_.latent_begin), pre});
    ++entries_->place[static_cast<size_t>(row)];
  }

  const float* threshold_;
  EncodeTiles::Task task_{};
  TaskEntries* entries_ = nullptr;
};

std::vector<TaskEntries> collect(EncodeTiles& tiles, const EncodeLimits& limits,
                                 const float* threshold) {
  std::vector<TaskEntries> entries(static_cast<size_t>(tiles.tasks()));
  std::vector<Collector> collectors(static_cast<size_t>(tiles.slots()), Collector(threshold));
  parallel_tasks(tiles.tasks(), tiles.slots(), [&](int64_t t, int64_t slot) {
    Collector& collector = collectors[static_cast<size_t>(slot)];
    collector.start(tiles.task(t), entries[static_cast<size_t>(t)]);
    tiles.run(tiles.task(t), slot, limits,
              [&](int64_t row, int64_t latent, int64_t count, const int32_t* position,
                  const float* pre) { collector.visit(row, latent, count, position, pre); });
  });
  return entries;
}

// Turns the counts into places, drops every invalid entry of a row but the first, fills offsets;
// returns the total.
int64_t place_entries(const EncodeTiles& tiles, std::vector<TaskEntries>& entries, int64_t n,
                      int64_t* offsets) {
  int64_t total = 0;
  for (int64_t row = 0; row < n; ++row) {
    offsets[row] = total;
    const int64_t first = tiles.ranges() == 0 ? 0 : row / tiles.row_block() * tiles.ranges();
    const size_t local = tiles.ranges() == 0 ? 0 : static_cast<size_t>(row % tiles.row_block());
    bool invalid = false;
    for (int64_t t = first; t < first + tiles.ranges(); ++t) {
      TaskEntries& task = entries[static_cast<size_t>(t)];
      const int64_t count = task.place[local] - (invalid && task.invalid[local] != 0);
      task.place[local] = total;
      total += count;
      if (task.invalid[local] == 0) continue;
      task.invalid[local] = !invalid;
      invalid = true;
    }
  }
  offsets[n] = total;
  return total;
}

void write_entries(const EncodeTiles& tiles, std::vector<TaskEntries>& entries,
                   const float* threshold, int32_t* indices, float* values, float* gates) {
  parallel_tasks(tiles.tasks(), [&](int64_t t, int64_t) {
    TaskEntries& task = entries[static_cast<size_t>(t)];
    const int64_t begin = tiles.task(t).latent_begin;
    task.records.for_each([&](const Record& record) {
      const bool invalid = std::isnan(record.value);
      if (invalid && task.invalid[record.row] == 0) return;
      const int64_t latent = begin + record.latent, at = task.place[record.row]++;
      const bool active = invalid || record.value > threshold[latent];
      indices[at] = static_cast<int32_t>(latent);
      values[at] = active ? record.value + 0.0f : 0.0f;  // -0.0 + 0.0 is 0.0
      gates[at] = active ? 1.0f : 0.0f;
    });
    task = TaskEntries();
  });
}

std::vector<float> lower_limits(const float* threshold, int64_t d_sae, double bandwidth) {
  const float half = bandwidth > 0 ? static_cast<float>(bandwidth / 2) : 0.0f;
  std::vector<float> limit(static_cast<size_t>(d_sae));
  for (int64_t j = 0; j < d_sae; ++j) limit[static_cast<size_t>(j)] = threshold[j] - half;
  return limit;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> jumprelu_encode_cpu(
    const Tensor& x, const Tensor& W_enc, const Tensor& b_enc, const Tensor& threshold,
    double bandwidth, std::optional<int64_t> max_nnz, bool by_feature,
    std::optional<Tensor> packed) {
  check_encode(kOp, x, W_enc, b_enc);
  const int64_t n = x.size(0), d_sae = W_enc.size(1);
  check_dtype(kOp, "threshold", threshold, ScalarType::Float);
  check_shape(kOp, "threshold", threshold, {d_sae});
  constexpr double largest = std::numeric_limits<float>::max();
  if (!(bandwidth >= 0 && bandwidth <= largest)) {
    fail(kOp, "bandwidth must be in [0, ", largest, "], got ", bandwidth);
  }
  if (max_nnz && *max_nnz < 0) fail(kOp, "max_nnz must be >= 0, got ", *max_nnz);

  const FloatVector bias(b_enc), theta(threshold);
  const std::vector<float> limit = lower_limits(theta.data(), d_sae, bandwidth);
  const EncodeLimits limits = {bias.data(), limit.data(), nullptr};
  EncodeTiles tiles(kOp, matrix_of(x), features(W_enc), packed_encoder(kOp, packed, W_enc));
  std::vector<TaskEntries> entries = collect(tiles, limits, theta.data());

  Tensor offsets = new_tensor(x, {n + 1}, ScalarType::Long);
  const int64_t needed =
      place_entries(tiles, entries, n, static_cast<int64_t*>(offsets.data_ptr()));
  const int64_t capacity = max_nnz.value_or(needed);
  if (needed > capacity) {
    throw std::runtime_error("CapacityError: jumprelu_encode: max_nnz=" + std::to_string(capacity) +
                             " is too small, " + std::to_string(needed) +
                             " entries are needed; pass max_nnz >= " + std::to_string(needed));
  }
  const EncodeOutput out(x, capacity, needed);
  write_entries(tiles, entries, theta.data(), out.indices_data(), out.values_data(),
                out.gate_data());
  auto [feature_offsets, permutation] = feature_view(by_feature, x, offsets, out.indices, d_sae);
  return {offsets,         out.indices, out.values, out.gate, int64_scalar(x, needed),
          feature_offsets, permutation};
}

STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast, CPU, m) { GSF_CPU_IMPL(m, kOp, jumprelu_encode_cpu); }

}  // namespace gemmascope_fast
