// decode and decode_ on the CPU: the sparse product of activations with the decoder.
//
//   recon [n, d_out] = b_dec [d_out] + values * W_dec[indices]     (entries of a row in stored order)
//
// Token-major: each row accumulates in float32 in L1 (or directly in a float32 output) while W_dec's rows stream past,
// four at a time with the next four prefetched. Rounded to the output's dtype once. Bound by reading nnz rows of W_dec.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/token_pass.h"

namespace gemmascope_fast {
namespace {

constexpr char kDecode[] = "decode";
constexpr char kDecodeInPlace[] = "decode_";

void check_W_dec(const char* op, const Tensor& W_dec) {
  check_dim(op, "W_dec", W_dec, 2);
  check_float(op, "W_dec", W_dec);
}

// Two elements of recon in one place would make the sum depend on the order of the writes.
void check_distinct_elements(const char* op, const Tensor& recon) {
  int64_t inner = recon.stride(0) < recon.stride(1) ? 0 : 1;
  if (recon.size(inner) <= 1) inner = 1 - inner;
  const int64_t outer = 1 - inner;
  if (recon.size(inner) <= 1 || recon.size(outer) == 0) return;
  const bool distinct =
      recon.stride(inner) > 0 &&
      (recon.size(outer) == 1 || recon.stride(outer) >= recon.size(inner) * recon.stride(inner));
  if (distinct) return;
  fail(op, "recon must not overlap itself, got shape ", shape_of(recon), " and strides [",
       recon.stride(0), ", ", recon.stride(1), "]; pass recon.clone()");
}

struct Bytes {
  uintptr_t begin, end;
};

Bytes bytes_between(const Tensor& t) {
  const auto begin = reinterpret_cast<uintptr_t>(t.data_ptr());
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (t.size(i) == 0) return {begin, begin};
    last += (t.size(i) - 1) * t.stride(i);
  }
  return {begin, begin + static_cast<uintptr_t>(last + 1) * t.element_size()};
}

// A row of recon must not change what another row still reads. By the addresses from first to last element: columns of
// one matrix that lie between each other's are refused, too.
void check_separate(const char* op, const Tensor& recon, const char* name, const Tensor& read) {
  const Bytes a = bytes_between(recon), b = bytes_between(read);
  if (a.begin == a.end || b.begin == b.end || a.end <= b.begin || b.end <= a.begin) return;
  fail(op, "recon shares memory with ", name, ", which is read while recon is written; pass ", name,
       ".clone()");
}

}  // namespace

Tensor decode_cpu(const Tensor& offsets, const Tensor& indices, const Tensor& values,
                  const Tensor& W_dec, std::optional<Tensor> b_dec, std::optional<Tensor>,
                  std::optional<Tensor>, ScalarType dtype) {
  constexpr auto op = kDecode;
  check_W_dec(op, W_dec);
  Entries entries = check_entries(op, offsets, indices, W_dec.size(0));
  const float* coef = entry_floats(op, "values", values, &entries);
  const float* bias = nullptr;
  if (b_dec.has_value()) {
    bias = vector_data<float>(op, "b_dec", *b_dec, ScalarType::Float, W_dec.size(1), &entries.keep);
  }
  Tensor recon = new_tensor(W_dec, {entries.n, W_dec.size(1)}, dtype);
  check_float(op, "dtype", recon);
  sum_tokens({&entries, coef, &W_dec, matrix_of(W_dec), bias}, matrix_of(recon));
  return recon;
}

void decode__cpu(Tensor recon, const Tensor& offsets, const Tensor& indices, const Tensor& values,
                 const Tensor& W_dec) {
  constexpr auto op = kDecodeInPlace;
  check_W_dec(op, W_dec);
  check_float(op, "recon", recon);
  Entries entries = check_entries(op, offsets, indices, W_dec.size(0));
  check_shape(op, "recon", recon, {entries.n, W_dec.size(1)});
  const float* coef = entry_floats(op, "values", values, &entries);
  check_distinct_elements(op, recon);
  check_separate(op, recon, "W_dec", W_dec);
  check_separate(op, recon, "values", values);
  check_separate(op, recon, "offsets", offsets);
  check_separate(op, recon, "indices", indices);
  sum_tokens({&entries, coef, &W_dec, matrix_of(W_dec), nullptr, true}, matrix_of(recon));
}

STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast, CPU, m) {
  GSF_CPU_IMPL(m, kDecode, decode_cpu);
  GSF_CPU_IMPL(m, kDecodeInPlace, decode__cpu);
}

}  // namespace gemmascope_fast
