// TopK encoder: the k largest of relu(x @ W_enc + b_enc) per row, exactly, without the matrix.
//
//   pre = x @ W_enc + b_enc;  k entries per row, NaN largest, ties to the smaller latent,
//   in ascending latent order
//   x [n, d_in], W_enc [d_in, d_sae], b_enc [d_sae]
//
// Source: Scaling and evaluating sparse autoencoders, arXiv 2406.04093, section 2.
// Algorithm: only what exceeds the row's limit becomes a candidate, and the k-th best seen so far is a limit, even when stale.
// Where entries are screened a better one is the r-th best, r the most of the k best that the part seen so far may hold, but
// for luck (sample_ranks.h). With AMX what the codes say of an entry, less a few standard deviations, is enough to tell that, and
// candidates are held (encode_held.cpp) until a limit rules them out. k entries above the limit prove it in the end; rows where
// they are not are looked at again, by the k-th best.
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
// Standard deviations by which an entry is taken for smaller than its codes say. Where k are wanted, others that are larger than
// that stand in for one that is smaller; where one is, none does.
constexpr float kSpread = 4, kLone = 4;
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

// The k best entries that each row was shown, and some more, in no order.
class Best {
 public:
  Best(int64_t rows, int64_t k)
      : k_(k),
        stride_(k + std::clamp<int64_t>(k / 2, 32, 512)),
        entries_(static_cast<size_t>(rows * stride_)),
        sizes_(static_cast<size_t>(rows)) {}

  // Returns the k-th best, 0 where it is not known.
  float merge(int64_t row, const Candidate* found, int64_t count) {
    float last = 0;
    for (int64_t i = 0; i < count; ++i) {
      int64_t& size = sizes_[static_cast<size_t>(row)];
      entries_[static_cast<size_t>(row * stride_ + size++)] = found[i];
      if (size == stride_) last = cut(row);
    }
    return last;
  }

  // Keeps the k best. Returns the last of them, 0 where there are fewer.
  float cut(int64_t row) {
    int64_t& size = sizes_[static_cast<size_t>(row)];
    if (size < k_) return 0;
    const auto begin = entries_.begin() + row * stride_;
    std::nth_element(begin, begin + k_ - 1, begin + size, std::greater<>());
    size = k_;
    return value_of(begin[k_ - 1]);
  }

  // Of what the row has, 0 where that is less.
  float at_rank(int64_t row, int64_t rank) {
    const int64_t size = sizes_[static_cast<size_t>(row)];
    if (rank > size) return 0;
    const auto begin = entries_.begin() + row * stride_;
    std::nth_element(begin, begin + rank - 1, begin + size, std::greater<>());
    return value_of(begin[rank - 1]);
  }

  int64_t size(int64_t row) const { return sizes_[static_cast<size_t>(row)]; }
  void clear(int64_t row) { sizes_[static_cast<size_t>(row)] = 0; }
  const Candidate* begin(int64_t row) const { return entries_.data() + row * stride_; }
  const Candidate* end(int64_t row) const { return begin(row) + sizes_[static_cast<size_t>(row)]; }

 private:
  int64_t k_, stride_;
  std::vector<Candidate> entries_;
  std::vector<int64_t> sizes_;
};

// The k largest values that are expected of each row, sorted.
class Expected {
 public:
  Expected(int64_t rows, int64_t k)
      : k_(k),
        stride_(k + few(k)),
        values_(static_cast<size_t>(rows * stride_)),
        sizes_(static_cast<size_t>(rows)) {}

  // How many are merged together where there are `size`: at first a few, which raise a young limit by much.
  static int64_t few(int64_t size) { return 2 + size / 8; }

  // Merges few(k) values or fewer. Returns how many the row has now.
  int64_t merge(int64_t row, const float* values, int64_t count) {
    int64_t& size = sizes_[static_cast<size_t>(row)];
    const auto begin = values_.begin() + row * stride_, middle = begin + size;
    std::copy(values, values + count, middle);
    std::sort(middle, middle + count, std::greater<>());
    std::inplace_merge(begin, middle, middle + count, std::greater<>());
    return size = std::min(k_, size + count);
  }

  // 0 where there are fewer.
  float at_rank(int64_t row, int64_t rank) const {
    if (rank > sizes_[static_cast<size_t>(row)]) return 0;
    return values_[static_cast<size_t>(row * stride_ + rank - 1)];
  }

 private:
  int64_t k_, stride_;
  std::vector<float> values_;
  std::vector<int64_t> sizes_;
};

// The k best entries of every row so far, whoever found them, and a limit that rises with them. The order is total, so the
// outcome does not depend on the schedule.
class BestEntries {
 public:
  // ranks: of a part of the latents: they raise the limits too, in the first pass. Or null.
  BestEntries(const EncodeTiles& tiles, int64_t k, const SampleRanks* ranks)
      : tiles_(&tiles),
        ranks_(ranks),
        holds_(ranks != nullptr && tiles.holds(k)),
        best_(tiles.rows(), k),
        expected_(holds_ ? tiles.rows() : 0, k),
        limits_(static_cast<size_t>(tiles.rows())) {
    for (std::atomic<float>& limit : limits_) limit.store(0.0f, std::memory_order_relaxed);
  }

  // Whether limits are estimated, and by what is expected of entries before they are shown.
  bool estimates() const { return ranks_ != nullptr; }
  bool holds() const { return holds_; }

  // What does not exceed this need not be shown.
  float limit(int64_t row) const {
    return limits_[static_cast<size_t>(row)].load(std::memory_order_relaxed);
  }

  // Returns how many entries the row has now.
  int64_t merge(int64_t row, const Candidate* found, int64_t count) {
    std::lock_guard<std::mutex> lock(lock_of(row));
    if (limit(row) == kInf) return 0;  // a value that is not finite comes whatever the limit is
    raise(row, best_.merge(row, found, count));
    if (estimates() && !holds_) raise(row, best_.at_rank(row, rank(row)));
    return best_.size(row);
  }

  // Of entries that may be shown later. They raise the limit, which `prove` then looks after. Returns how many are expected.
  int64_t expect(int64_t row, const float* values, int64_t count) {
    std::lock_guard<std::mutex> lock(lock_of(row));
    const int64_t size = expected_.merge(row, values, count);
    raise(row, expected_.at_rank(row, rank(row)));
    return size;
  }

  // All have been shown. Whether no other entry can be better: a row has k entries above its limit, or needs none. Of such a
  // row nothing is wanted any more; one that is not proved begins anew, from the limit that what it has found sets.
  bool prove() {
    std::atomic<bool> all{true};
    each_row([&](int64_t row) {
      const float last = best_.cut(row);
      std::atomic<float>& own = limits_[static_cast<size_t>(row)];
      if (own == 0 || !(last <= own)) {
        own = kInf;
        return;
      }
      own = std::nextafter(last, 0.0f);
      best_.clear(row);
      all = false;
    });
    ranks_ = nullptr;
    return all;
  }

  void finish() {
    each_row([&](int64_t row) { best_.cut(row); });
  }

  const Candidate* begin(int64_t row) const { return best_.begin(row); }
  const Candidate* end(int64_t row) const { return best_.end(row); }

 private:
  template <class Work>
  void each_row(const Work& work) {
    parallel_ranges(tiles_->rows(), 64, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) work(row);
    });
  }

  // Under the row's lock: what others have merged they had counted as visited.
  int64_t rank(int64_t row) const { return ranks_->rank(tiles_->visited(row)); }

  std::mutex& lock_of(int64_t row) { return locks_[static_cast<size_t>(row) % kLocks]; }

  // An entry equal to the value may have a smaller latent: the limit is below it. It never falls: what was not shown before
  // was below it.
  void raise(int64_t row, float value) {
    value = std::isnan(value) ? kInf : value;  // nothing but NaN beats NaN
    const float limit = std::nextafter(value, 0.0f);
    std::atomic<float>& own = limits_[static_cast<size_t>(row)];
    if (limit > own.load(std::memory_order_relaxed)) own.store(limit, std::memory_order_relaxed);
  }

  static constexpr size_t kLocks = 64;  // rows that share one rarely meet: two threads, few merges
  const EncodeTiles* tiles_;
  const SampleRanks* ranks_;
  bool holds_;
  Best best_;
  Expected expected_;
  std::vector<std::atomic<float>> limits_;
  std::array<std::mutex, kLocks> locks_;
};

// What one thread has found, row by row until there are a few: a row's lists travel between cores.
template <class T>
class Few {
 public:
  Few(int64_t rows, int64_t capacity)
      : capacity_(capacity),
        values_(static_cast<size_t>(rows * capacity)),
        rows_(static_cast<size_t>(rows)) {}

  // merge(row, values, count) is called when there are `due` of a row, capacity or fewer.
  template <class Merge>
  void add(int64_t row, T value, int64_t due, const Merge& merge) {
    Row& own = rows_[static_cast<size_t>(row) % rows_.size()];
    if (own.row != row) hand_on(own, merge);
    own.row = row;
    begin(own)[own.size++] = value;
    if (own.size >= due) hand_on(own, merge);
  }

  template <class Merge>
  void flush(const Merge& merge) {
    for (Row& row : rows_) hand_on(row, merge);
  }

 private:
  struct Row {
    int64_t row = -1, size = 0;
  };
  T* begin(const Row& row) { return values_.data() + (&row - rows_.data()) * capacity_; }
  template <class Merge>
  void hand_on(Row& row, const Merge& merge) {
    if (row.size > 0) merge(row.row, begin(row), row.size);
    row.size = 0;
  }

  int64_t capacity_;
  std::vector<T> values_;
  std::vector<Row> rows_;
};

// One thread's candidates and what it expects of them.
class Collector {
 public:
  Collector(const EncodeTiles& tiles, int64_t k, BestEntries& best)
      : best_(&best),
        early_(best.estimates() && !best.holds()),
        rows_(std::min(tiles.row_block(), tiles.rows())),
        capacity_(std::clamp<int64_t>(k / 2, 32, 512)),
        spread_(kSpread + kLone / std::sqrt(static_cast<float>(k))),
        found_(rows_, capacity_),
        expected_(best.holds() ? rows_ : 1, Expected::few(k)),
        sizes_(static_cast<size_t>(rows_)) {}

  void visit(int64_t row, int64_t latent, int64_t count, const int32_t* position,
             const float* pre) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t due = early_ ? std::min(few(row), capacity_) : capacity_;
      found_.add(row, candidate(pre[i], static_cast<int32_t>(latent) + position[i]), due, merge_);
    }
  }

  void expect(int64_t row, float value, float deviation) {
    value = std::isnan(value) ? kInf : value - spread_ * deviation;
    if (value <= best_->limit(row)) return;
    expected_.add(row, value, few(row), expect_);
  }

  void flush() {
    expected_.flush(expect_);
    found_.flush(merge_);
  }

 private:
  int64_t few(int64_t row) const { return Expected::few(sizes_[static_cast<size_t>(row % rows_)]); }

  const std::function<void(int64_t, const Candidate*, int64_t)> merge_ =
      [this](int64_t row, const Candidate* found, int64_t count) {
        const int64_t size = best_->merge(row, found, count);
        if (early_) sizes_[static_cast<size_t>(row % rows_)] = size;
      };
  const std::function<void(int64_t, const float*, int64_t)> expect_ =
      [this](int64_t row, const float* values, int64_t count) {
        sizes_[static_cast<size_t>(row % rows_)] = best_->expect(row, values, count);
      };
  BestEntries* best_;
  bool early_;  // hands the first few on at once, which raise a young limit by much
  int64_t rows_, capacity_;
  float spread_;
  Few<Candidate> found_;
  Few<float> expected_;
  std::vector<int64_t> sizes_;
};

void collect(EncodeTiles& tiles, const float* bias, int64_t k, BestEntries& best) {
  std::vector<std::unique_ptr<Collector>> collectors(static_cast<size_t>(tiles.slots()));
  const auto with = [&](int64_t slot, const auto& work) {
    auto& collector = collectors[static_cast<size_t>(slot)];
    if (!collector) collector = std::make_unique<Collector>(tiles, k, best);
    Collector& own = *collector;
    EncodeLimits limits = {bias, nullptr, [&](int64_t row) { return best.limit(row); }};
    if (best.estimates() && best.holds()) {
      limits.expect = [&](int64_t row, float value, float deviation) {
        own.expect(row, value, deviation);
      };
    }
    work(limits, [&](int64_t row, int64_t latent, int64_t count, const int32_t* position,
                     const float* pre) { own.visit(row, latent, count, position, pre); });
    own.flush();
  };
  parallel_tasks(tiles.tasks(), tiles.slots(), [&](int64_t t, int64_t slot) {
    with(slot, [&](const EncodeLimits& limits, const EncodeTiles::Visit& visit) {
      tiles.run(tiles.task(t), slot, limits, visit);
    });
  });
  if (!best.estimates() || !best.holds()) return;
  parallel_tasks(tiles.slots(), [&](int64_t slot, int64_t) {
    with(slot, [&](const EncodeLimits& limits, const EncodeTiles::Visit& visit) {
      tiles.finish(slot, limits, visit);
    });
  });
}

void select(EncodeTiles& tiles, const float* bias, int64_t k, BestEntries& best) {
  if (best.estimates()) {
    tiles.shuffle();
    collect(tiles, bias, k, best);
    if (best.prove()) return;
  }
  collect(tiles, bias, k, best);
  best.finish();
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
    std::optional<SampleRanks> ranks;
    if (tiles.screened() && k <= d_sae / kFew) ranks.emplace(k, d_sae);
    BestEntries best(tiles, k, ranks ? &*ranks : nullptr);
    select(tiles, bias.data(), k, best);
    write_entries(best, n, k, out);
  }
  auto [feature_offsets, permutation] = feature_view(by_feature, x, offsets, out.indices, d_sae);
  return {offsets, out.indices, out.values, out.gate, feature_offsets, permutation};
}

STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast, CPU, m) { GSF_CPU_IMPL(m, kOp, topk_encode_cpu); }

}  // namespace gemmascope_fast
