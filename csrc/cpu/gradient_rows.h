// Where the gradient rows of one block of latents accumulate, and how they reach the gradient.
//
//   in place   float32 rows of a gradient that the caches hold, or of one that is zero already and gets few of them
//   streamed   one scratch row in L1, written around the caches when it is complete, zeros where nothing was added: every
//              line of a large gradient is written once and none is read
//   by block   16 scratch rows, rounded or transposed out together
//   updated    one scratch row, consumed by Adam: there is no gradient
#pragma once

#include <optional>
#include <vector>

#include "cpu/adam_rows.h"
#include "cpu/matrix_rows.h"

namespace gemmascope_fast {

// A gradient seen as one row per latent. `zeroed`: its memory is zero already. `update`: there is no such memory; each row
// of `rows` (then the weight itself, for its shape) is updated from its gradient.
struct LatentGradient {
  Matrix rows;
  bool zeroed;
  const AdamMatrix* update = nullptr;
};

class GradientRows {
 public:
  explicit GradientRows(const LatentGradient& gradient);
  ~GradientRows();
  GradientRows(const GradientRows&) = delete;

  void begin(int64_t j) { first_ = j; }
  // Sums of latent j, [cols].
  float* row(int64_t j) {
    if (way_ == Way::kInPlace) return static_cast<float*>(const_cast<void*>(out_.rows.row(j)));
    return scratch_.data() + (way_ == Way::kByBlock ? (j - first_) * ld_ : 0);
  }
  // The row of latent j is complete; `touched`: it was written. next: the next latent that will be, or -1.
  void done(int64_t j, bool touched, int64_t next);
  // Memory that latent j will read: the row that an update changes, or that the gradient is written to.
  RowAhead ahead(int64_t j) const;
  // offsets: feature_offsets + the block's first latent.
  void finish(int64_t count, const int64_t* offsets);

 private:
  enum class Way { kInPlace, kStreamed, kByBlock, kUpdated };
  static Way way_of(const LatentGradient& gradient);

  void stream(int64_t j, bool touched);
  void clear_row(int64_t j);

  LatentGradient out_;
  Way way_;
  int64_t ld_;
  std::vector<float> scratch_;
  std::vector<uint16_t> rounded_;
  std::optional<AdamRows> adam_;
  int64_t first_ = 0;
};

}  // namespace gemmascope_fast
