// Pre-activations of given (row, latent) pairs, without a gate.
//
//   pre[p] = <x[rows[p]], W_enc[:, latents[p]]> + b_enc[latents[p]]
//   x [n, d_in], W_enc [d_in, d_sae], rows and latents [p] int64
//
// Algorithm: one canonical dot product per pair, so the bits are those of the encoders; ranges of
// pairs in parallel. A converted row is kept while the next pair uses it again.
// Bound: the read of the W_enc rows.
#include <torch/csrc/stable/library.h>

#include "cpu/encode_tiles.h"
#include "cpu/entries.h"
#include "cpu/parallel.h"

namespace gemmascope_fast {
namespace {

constexpr char kOp[] = "pre_at";

class RowReader {
 public:
  explicit RowReader(const PaddedRows& rows) : rows_(rows) {}
  const float* row(int64_t index) {
    int64_t stride;
    if (index != last_) data_ = rows_.rows(index, 1, buffer_, &stride);
    last_ = index;
    return data_;
  }

 private:
  const PaddedRows& rows_;
  FloatBuffer buffer_;
  int64_t last_ = -1;
  const float* data_ = nullptr;
};

const int64_t* data_of(const Tensor& t) { return static_cast<const int64_t*>(t.data_ptr()); }

void check_indices(const char* name, const Tensor& t, int64_t end, const char* end_name) {
  const int64_t* data = data_of(t);
  const int64_t stride = t.stride(0);
  const auto bad = [=](int64_t p) {
    return static_cast<uint64_t>(data[p * stride]) >= static_cast<uint64_t>(end);
  };
  const int64_t p = first_bad(t.size(0), bad);
  if (p == t.size(0)) return;
  fail(kOp, name, "[", p, "] = ", data[p * stride], " is out of range [0, ", end_name, "=", end,
       ")");
}

}  // namespace

Tensor pre_at_cpu(const Tensor& x, const Tensor& W_enc, const Tensor& b_enc, const Tensor& rows,
                  const Tensor& latents) {
  check_encode(kOp, x, W_enc, b_enc);
  check_dim(kOp, "rows", rows, 1);
  check_dtype(kOp, "rows", rows, ScalarType::Long);
  check_dtype(kOp, "latents", latents, ScalarType::Long);
  check_shape(kOp, "latents", latents, {rows.size(0)});
  const int64_t pairs = rows.size(0);
  check_indices("rows", rows, x.size(0), "n");
  check_indices("latents", latents, W_enc.size(1), "d_sae");

  Tensor pre = new_tensor(x, {pairs}, ScalarType::Float);
  float* out = static_cast<float*>(pre.data_ptr());
  const FloatVector bias(b_enc);
  const DotTable& table = dot_table(simd_target());
  const PaddedRows x_rows(matrix_of(x)), w_rows(features(W_enc));
  parallel_ranges(pairs, 64, [&](int64_t begin, int64_t end) {
    RowReader x_reader(x_rows), w_reader(w_rows);
    FloatBuffer state;
    for (int64_t p = begin; p < end; ++p) {
      const float* x_row = x_reader.row(data_of(rows)[p * rows.stride(0)]);
      const int64_t latent = data_of(latents)[p * latents.stride(0)];
      float dot;
      table.panel(x_row, 0, 1, w_reader.row(latent), 0, 1, x_rows.padded_cols(), state.reserve(16),
                  &dot, 1);
      out[p] = dot + bias.data()[latent];
    }
  });
  return pre;
}

STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast, CPU, m) { GSF_CPU_IMPL(m, kOp, pre_at_cpu); }

}  // namespace gemmascope_fast
