#include "cpu/gradient_rows.h"

#include <cstring>

namespace gemmascope_fast {
namespace {

// A gradient of this size leaves nothing in a cache for the one who reads it.
constexpr int64_t kStreamedBytes = int64_t{16} << 20;

// memset must not be handed the null pointer of an empty row.
void clear(void* row, int64_t bytes) {
  if (bytes != 0) std::memset(row, 0, static_cast<size_t>(bytes));
}

int64_t row_bytes(const Matrix& m) { return m.cols * element_size(m.dtype); }

}  // namespace

GradientRows::Way GradientRows::way_of(const LatentGradient& gradient) {
  const Matrix& rows = gradient.rows;
  if (gradient.update != nullptr) return Way::kUpdated;
  const bool large = !gradient.zeroed && rows.rows * row_bytes(rows) > kStreamedBytes;
  if (large && unit_columns(rows)) return Way::kStreamed;
  return direct_rows(rows) ? Way::kInPlace : Way::kByBlock;
}

GradientRows::GradientRows(const LatentGradient& gradient)
    : out_(gradient),
      way_(way_of(gradient)),
      ld_(gradient.rows.cols + 16) {  // + 16: columns of the block must not all fall into one set
  const int64_t rows = way_ == Way::kInPlace ? 0 : way_ == Way::kByBlock ? kRowBlock : 1;
  scratch_.resize(static_cast<size_t>(rows * ld_));
  const bool rounds = way_ == Way::kStreamed && !direct_rows(out_.rows);
  rounded_.resize(static_cast<size_t>(rounds ? out_.rows.cols : 0));
  if (gradient.update != nullptr) adam_.emplace(*gradient.update);
}

GradientRows::~GradientRows() {
  if (way_ == Way::kStreamed) rows_table().stream_fence();
}

void GradientRows::done(int64_t j, bool touched, int64_t next) {
  if (adam_) adam_->update(j, touched ? scratch_.data() : nullptr, next);
  if (way_ == Way::kStreamed) stream(j, touched);
}

void GradientRows::stream(int64_t j, bool touched) {
  const void* row = touched ? scratch_.data() : nullptr;
  if (touched && !rounded_.empty()) {
    rows_table().narrow(static_cast<int>(out_.rows.dtype), scratch_.data(), out_.rows.cols,
                        rounded_.data());
    row = rounded_.data();
  }
  rows_table().stream(row, row_bytes(out_.rows), const_cast<void*>(out_.rows.row(j)));
}

RowAhead GradientRows::ahead(int64_t j) const {
  if (j < 0 || way_ == Way::kStreamed || !unit_columns(out_.rows)) return {nullptr, 0};
  return {out_.rows.row(j), element_size(out_.rows.dtype)};
}

void GradientRows::finish(int64_t count, const int64_t* offsets) {
  if (way_ == Way::kUpdated || way_ == Way::kStreamed) return;
  const bool untouched = offsets[0] == offsets[count];
  if (untouched && out_.zeroed) return;
  const bool columns = !unit_columns(out_.rows);
  for (int64_t i = 0; i < count; ++i) {
    const bool touched = offsets[i] != offsets[i + 1];
    if (!touched && columns) clear(scratch_.data() + i * ld_, out_.rows.cols * 4);
    if (!touched && !columns && !out_.zeroed) clear_row(first_ + i);
    if (touched && !columns && way_ == Way::kByBlock) {
      store_rows(out_.rows, first_ + i, 1, scratch_.data() + i * ld_, ld_);
    }
  }
  if (columns) store_rows(out_.rows, first_, count, scratch_.data(), ld_);
}

void GradientRows::clear_row(int64_t j) {
  clear(const_cast<void*>(out_.rows.row(j)), row_bytes(out_.rows));
}

}  // namespace gemmascope_fast
