// A task is a range of blocks of 16 latents with about equally much work. Where gradient rows accumulate is gradient_rows.h's
// choice. Entries are taken four at a time, tokens ascending. Bound by one row of W_dec read from DRAM per touched latent, every
// row of a large gradient written, and g and x read from L3 once per entry. Rows of W_dec are prefetched a few latents ahead.
#include "cpu/feature_pass.h"

#include "cpu/by_feature.h"

namespace gemmascope_fast {
namespace {

constexpr int64_t kTasksPerSlot = 16;
// Touched latents between a row of W_dec and its prefetch: most have a row or two of sums, less time than DRAM takes.
constexpr int kLatentsAhead = 4;

// W_dec's rows of one block, widened or transposed where they are not contiguous float32.
class WeightRows {
 public:
  explicit WeightRows(const Matrix& W)
      : W_(W), scratch_(static_cast<size_t>(direct_rows(W) ? 0 : kRowBlock * W.cols)) {}

  void begin(int64_t j, int64_t count) {
    first_ = j;
    if (!unit_columns(W_)) load_rows(W_, j, count, scratch_.data(), W_.cols);
  }
  const float* row(int64_t j) {
    if (direct_rows(W_)) return static_cast<const float*>(W_.row(j));
    float* row = scratch_.data() + (j - first_) * W_.cols;
    if (unit_columns(W_)) load_rows(W_, j, 1, row, W_.cols);
    return row;
  }
  RowAhead ahead(int64_t j) const {
    if (j < 0 || !unit_columns(W_)) return {nullptr, 0};
    return {W_.row(j), element_size(W_.dtype)};
  }

 private:
  Matrix W_;
  std::vector<float> scratch_;
  int64_t first_ = 0;
};

// Up to four entries of one latent.
struct Batch {
  int64_t entry[kRowGroup];
  int64_t row[kRowGroup];
  float d_values[kRowGroup];
  int count;
  bool first;
};

class Worker {
 public:
  Worker(const Entries& entries, const FeatureView& view, const int64_t* rows,
         const DecoderPart* decoder, const EncoderPart* encoder, int64_t first)
      : entries_(entries), view_(view), rows_(rows), decoder_(decoder), encoder_(encoder) {
    ahead_ = touched_from(first);
    for (int i = 1; i < kLatentsAhead; ++i) look_further();
    if (decoder != nullptr) d_W_dec_.emplace(decoder->d_W_dec);
    if (decoder != nullptr && decoder->W_dec.has_value()) W_dec_.emplace(*decoder->W_dec);
    if (encoder != nullptr && encoder->d_W_enc.has_value()) d_W_enc_.emplace(*encoder->d_W_enc);
  }

  void block(int64_t begin, int64_t end) {
    const int64_t* offsets = view_.offsets + begin;
    const int64_t count = end - begin;
    const bool touched = offsets[0] != offsets[count];
    if (d_W_dec_) d_W_dec_->begin(begin);
    if (d_W_enc_) d_W_enc_->begin(begin);
    if (W_dec_ && touched) W_dec_->begin(begin, count);
    for (int64_t j = begin; j < end; ++j) latent(j);
    if (d_W_dec_) d_W_dec_->finish(count, offsets);
    if (d_W_enc_) d_W_enc_->finish(count, offsets);
  }

 private:
  void latent(int64_t j) {
    sum_b_ = 0;
    sum_threshold_ = 0;
    const int64_t begin = view_.offsets[j], end = view_.offsets[j + 1];
    const float* w = W_dec_ && begin < end ? W_dec_->row(j) : nullptr;
    if (begin < end) {
      next_ = touched_from(j + 1);
      look_further();
    }
    for (int64_t p = begin; p < end; p += kRowGroup) {
      Batch batch;
      batch.count = static_cast<int>(std::min<int64_t>(kRowGroup, end - p));
      batch.first = p == begin;
      for (int i = 0; i < batch.count; ++i) {
        batch.entry[i] = view_.permutation[p + i];
        batch.row[i] = rows_[batch.entry[i]];
      }
      if (decoder_ != nullptr) decode(j, w, &batch);
      if (encoder_ != nullptr) encode(j, &batch);
    }
    if (d_W_dec_) d_W_dec_->done(j, begin < end, next_);
    if (d_W_enc_) d_W_enc_->done(j, begin < end, next_);
    if (encoder_ == nullptr) return;
    if (encoder_->d_b_enc != nullptr) encoder_->d_b_enc[j] = sum_b_;
    if (encoder_->d_threshold != nullptr) {
      encoder_->d_threshold[j] = sum_threshold_ / static_cast<float>(-encoder_->bandwidth);
    }
  }

  void decode(int64_t j, const float* w, Batch* batch) {
    while (decoder_->group_ends[group_] <= j) ++group_;
    const FloatRows& g = decoder_->d_recon[group_];
    const float* rows[kRowGroup];
    float values[kRowGroup];
    for (int i = 0; i < batch->count; ++i) {
      rows[i] = g.row(batch->row[i]);
      values[i] = entries_.values[batch->entry[i]];
    }
    float* acc = d_W_dec_->row(j);
    if (!W_dec_) {
      rows_table().axpy(rows, values, batch->count, batch->first, g.cols, {nullptr, 0}, acc);
      return;
    }
    rows_table().dot_axpy(rows, values, batch->count, batch->first, g.cols, w,
                          batch->first ? W_dec_->ahead(ahead_) : RowAhead{nullptr, 0}, acc,
                          batch->d_values);
    if (decoder_->d_values == nullptr) return;
    for (int i = 0; i < batch->count; ++i) decoder_->d_values[batch->entry[i]] = batch->d_values[i];
  }

  void encode(int64_t j, Batch* batch) {
    const EncoderPart& encoder = *encoder_;
    const float* rows[kRowGroup];
    float d_pre[kRowGroup];
    for (int i = 0; i < batch->count; ++i) {
      const int64_t e = batch->entry[i];
      float d_value = decoder_ != nullptr ? batch->d_values[i] : 0.0f;
      if (encoder.d_values != nullptr) d_value = d_value + encoder.d_values[e];
      d_pre[i] = d_value * entries_.gate[e];
      sum_b_ += d_pre[i];
      if (encoder.d_pre != nullptr) encoder.d_pre[e] = d_pre[i];
      if (encoder.threshold != nullptr) add_threshold(encoder.threshold[j], d_value, e);
      if (d_W_enc_) rows[i] = encoder.x.row(batch->row[i] % encoder.n);
    }
    if (!d_W_enc_) return;
    rows_table().axpy(rows, d_pre, batch->count, batch->first, encoder.x.cols,
                      batch->first ? d_W_enc_->ahead(next_) : RowAhead{nullptr, 0},
                      d_W_enc_->row(j));
  }

  void add_threshold(float threshold, float d_value, int64_t e) {
    const float half = static_cast<float>(encoder_->bandwidth / 2);
    const bool in_window = entries_.gate[e] == 0 || entries_.values[e] < threshold + half;
    if (!in_window) return;
    const float d_gate = encoder_->d_gate != nullptr ? encoder_->d_gate[e] : 0.0f;
    sum_threshold_ += threshold * d_value + d_gate;
  }

  // The first latent from j on with entries, or -1; beyond the task it merely warms rows for another one.
  int64_t touched_from(int64_t j) const {
    while (j < entries_.d_sae && view_.offsets[j] == view_.offsets[j + 1]) ++j;
    return j < entries_.d_sae ? j : -1;
  }
  void look_further() {
    if (ahead_ >= 0) ahead_ = touched_from(ahead_ + 1);
  }

  const Entries& entries_;
  const FeatureView& view_;
  const int64_t* rows_;
  const DecoderPart* decoder_;
  const EncoderPart* encoder_;
  std::optional<GradientRows> d_W_dec_, d_W_enc_;
  std::optional<WeightRows> W_dec_;
  size_t group_ = 0;
  int64_t next_ = -1, ahead_ = -1;  // touched latents, or none
  float sum_b_ = 0, sum_threshold_ = 0;
};

}  // namespace

Tensor entry_rows(const Entries& entries, const Tensor& like) {
  Tensor rows = empty_vector(like, ScalarType::Long, entries.nnz);
  int64_t* data = static_cast<int64_t*>(rows.data_ptr());
  parallel_ranges(entries.n, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      std::fill(data + entries.offsets[r], data + entries.offsets[r + 1], r);
    }
  });
  return rows;
}

void feature_pass(const Entries& entries, const FeatureView& view, const int64_t* rows,
                  const DecoderPart* decoder, const EncoderPart* encoder) {
  const int64_t d_sae = entries.d_sae, blocks = (d_sae + kRowBlock - 1) / kRowBlock;
  const auto latent_of = [&](int64_t block) { return std::min(d_sae, block * kRowBlock); };
  const auto cost = [&](int64_t block) {
    return 4 * view.offsets[latent_of(block)] + latent_of(block);
  };
  const int64_t tasks = std::min(blocks, parallel_slots(blocks) * kTasksPerSlot);
  parallel_tasks(tasks, [&](int64_t task, int64_t) {
    const int64_t begin = balanced_begin(task, tasks, blocks, cost);
    const int64_t end = balanced_begin(task + 1, tasks, blocks, cost);
    Worker worker(entries, view, rows, decoder, encoder, latent_of(begin));
    for (int64_t b = begin; b < end; ++b) {
      worker.block(latent_of(b), latent_of(b + 1));
    }
  });
}

FeatureView feature_view(const char* op, const Tensor& offsets, const Tensor& indices,
                         const std::optional<Tensor>& feature_offsets,
                         const std::optional<Tensor>& permutation, const Entries& entries) {
  if (feature_offsets.has_value() && permutation.has_value()) {
    return check_feature_view(op, *feature_offsets, *permutation, entries);
  }
  FeatureView view;
  auto [starts, positions] = by_feature_cpu(offsets, indices, entries.d_sae);
  view.offsets = static_cast<const int64_t*>(starts.data_ptr());
  view.permutation = static_cast<const int64_t*>(positions.data_ptr());
  view.keep = {starts, positions};
  return view;
}

}  // namespace gemmascope_fast
