#include "cuda/dense_products.h"
#include "cuda/group_sums_kernel.cuh"
#include "cuda/sae_inputs.h"

namespace gemmascope_fast {
inline namespace on_cuda {
namespace {

void check_groups(const char* op, const std::vector<int64_t>& group_ends, const Tensor& d_recon,
                  int64_t d_sae) {
  const int64_t groups = static_cast<int64_t>(group_ends.size());
  if (groups == 0 || groups != d_recon.size(0)) {
    fail(op, "group_ends must have one element for each of d_recon's ", d_recon.size(0),
         " >= 1 groups, got ", groups);
  }
  int64_t previous = 0;
  for (int64_t end : group_ends) {
    if (end < previous) fail(op, "group_ends must ascend from 0, got ", end, " after ", previous);
    previous = end;
  }
  if (previous != d_sae) {
    fail(op, "group_ends must end with d_sae=", d_sae, ", got ", previous);
  }
}

// m = S * n, or 0 rows of both.
int64_t count_sets(const char* op, int64_t m, int64_t n) {
  if (n == 0 && m == 0) return 1;
  if (n == 0 || m % n != 0) fail(op, "offsets has ", m, " rows, expected a multiple of n=", n);
  return m / n;
}

// d_recon[g].
Tensor group_of(const Tensor& d_recon, int64_t g) { return torch::stable::select(d_recon, 0, g); }

void add_group(const char* op, const Rows& later, const Tensor& own, const Tensor& out) {
  const Rows rows = rows_of(own);
  if (rows.rows == 0 || rows.cols == 0) return;
  const int64_t blocks = std::min<int64_t>(rows.rows, std::numeric_limits<int32_t>::max());
  group_sums_kernel<<<static_cast<unsigned>(blocks), kGroupThreads, 0, current_stream(op, out)>>>(
      later, rows, mutable_floats(out));
  check_launch(op);
}

}  // namespace

SaeInputs sae_inputs_cuda(const char* op, const Tensor& x, const Tensor& W_enc,
                          const std::optional<Tensor>& threshold, double bandwidth,
                          const Tensor& W_dec, const Tensor& d_recon,
                          const std::vector<int64_t>& group_ends, const Tensor& offsets,
                          const Tensor& indices, const Tensor& values, const Tensor& gate,
                          const std::optional<Tensor>& d_values,
                          const std::optional<Tensor>& d_gate, const Tensor& feature_offsets,
                          const Tensor& permutation) {
  check_matrix(op, "x", x, x);
  check_matrix(op, "W_enc", W_enc, x);
  check_matrix(op, "W_dec", W_dec, x);
  check_dim(op, "d_recon", d_recon, 3);
  check_float(op, "d_recon", d_recon);
  check_device(op, "d_recon", d_recon, x);
  check_shape(op, "W_enc", W_enc, {x.size(1), W_dec.size(0)});
  const int64_t d_sae = W_dec.size(0);
  check_groups(op, group_ends, d_recon, d_sae);
  const DeviceEntries rows = entries_of(op, offsets, indices, x);
  check_shape(op, "d_recon", d_recon, {d_recon.size(0), rows.n, W_dec.size(1)});
  SaeInputs in;
  in.entries = feature_entries(op, rows, d_sae, feature_offsets, permutation, values, gate,
                               d_values, d_gate);
  in.d_sae = d_sae;
  in.n = x.size(0);
  in.sets = count_sets(op, rows.n, in.n);
  in.x = adjacent_columns(x);
  in.W_dec = adjacent_columns(W_dec);
  in.bandwidth = bandwidth;
  if (bandwidth > 0) {
    if (!threshold.has_value()) fail(op, "bandwidth ", bandwidth, " > 0 needs a threshold");
    in.threshold = vector_of(op, "threshold", *threshold, ScalarType::Float, d_sae, x);
  }
  in.d_recon = d_recon;
  in.group_ends = group_ends;
  return in;
}

// The pass reads S once for two of the three. With stacked entry sets a token would occur in a latent once per set.
bool sae_dense_pays(const SaeInputs& in, const Tensor& W_dec) {
  if (in.sets != 1) return false;
  const int64_t capacity = in.entries.rows.capacity;
  const Dtype result = dtype_of(W_dec);
  const Tensor g = group_of(in.d_recon, in.d_recon.size(0) - 1);
  return dense_pays(
      W_dec, {dots_work(0, W_dec, g), sum_work(Walk::kLatents, capacity, in.d_sae, g, result),
              sum_work(Walk::kLatents, capacity, in.d_sae, in.x, result)});
}

FeaturePass sae_pass(const char* op, SaeInputs& in, const Tensor& d_b_enc,
                     const Tensor& d_threshold) {
  FeaturePass p = feature_pass_of(op, in.entries, in.d_sae);
  p.decoder = p.dots = p.encoder = 1;
  p.n = in.n;
  p.x = rows_of(in.x);
  p.W_dec = rows_of(in.W_dec);
  p.d_b_enc = mutable_floats(d_b_enc);
  if (in.bandwidth > 0) want_threshold(&p, in.threshold, in.bandwidth, d_threshold);
  return p;
}

void for_groups(const char* op, const SaeInputs& in, FeaturePass p,
                const std::function<void(const FeaturePass&)>& run) {
  const int64_t last = static_cast<int64_t>(in.group_ends.size()) - 1;
  const Tensor own = adjacent_columns(group_of(in.d_recon, last));
  Tensor sum = own;
  for (int64_t g = last; g >= 0; --g) {
    if (g < last) {
      const Rows later = rows_of(sum);
      if (g == last - 1) {
        sum = torch::stable::new_empty(own, {own.size(0), own.size(1)}, ScalarType::Float);
      }
      add_group(op, later, group_of(in.d_recon, g), sum);
    }
    p.first = g == 0 ? 0 : in.group_ends[static_cast<size_t>(g - 1)];
    p.last = in.group_ends[static_cast<size_t>(g)];
    p.g = rows_of(sum);
    if (p.first < p.last) run(p);
  }
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
