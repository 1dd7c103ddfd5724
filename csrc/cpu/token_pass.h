// The token-major passes: every row of the output is a sum over that token's entries in stored order.
//
//   sum_tokens   out[r] = bias + sum_e coef[e] * W[indices[e]]     entries of rows r, r + n, ... (`sets` of them)
//   dot_tokens   out[e] = <W[indices[e]], g[row of e]>
#pragma once

#include "cpu/entries.h"
#include "cpu/matrix_rows.h"

namespace gemmascope_fast {

struct TokenSum {
  const Entries* entries;
  const float* coef;            // [capacity]
  const Tensor* W_owner;        // the tensor W views
  Matrix W;                     // [d_sae, d]
  const float* bias = nullptr;  // [d]
  bool add = false;             // round(out + sum) instead of round(bias + sum)
  int64_t sets = 1;
};

void sum_tokens(const TokenSum& sum, const Matrix& out);

// Padding positions of out [capacity] become 0.
void dot_tokens(const Entries& entries, const Tensor& W_owner, const Matrix& W, const FloatRows& g,
                float* out);

}  // namespace gemmascope_fast
