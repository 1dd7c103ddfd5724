// Adam on four elements, and what their row decides: plain arithmetic, the same on host and device.
//
//   g' = g - share w;  m = m decay1 + one_minus1 g';  v = v decay2 + (one_minus2 g') g'
//   w = w - (step_size m) / (sqrt(v) scale + eps)
//
// Every operation is rounded on its own, in this order, root and quotient correctly: the bits of every other backend.
#pragma once

#include "cuda/quotients.cuh"

namespace gemmascope_fast {

// The numbers of one step of one matrix.
struct AdamRates {
  float step_size, one_minus1, one_minus2, scale, eps;
};

// The numbers of one row; share: how much of w is in g, 0 without remove_parallel.
struct AdamDecays {
  float first, second, share;
};

// Whether sqrt(v) scale + eps lies between 2^-60 and 2^36 for all of middle_squares.
GSF_BOTH bool middle_rates(const AdamRates& rates) {
  return rates.scale >= 0x1p-9f && rates.scale <= 0x1p10f && rates.eps >= 0.0f &&
         rates.eps <= 0x1p34f;
}

// Four elements; m is read and written only with a first moment. True: all second moments are positive and finite.
GSF_BOTH bool adam_elements(const AdamRates& rates, const AdamDecays& row, bool momentum,
                            float (&g)[4], float (&m)[4], float (&v)[4], float (&w)[4]) {
  if (row.share != 0.0f) {  // NaN included
    for (int e = 0; e < 4; ++e) g[e] = rounded_sub(g[e], rounded_mul(row.share, w[e]));
  }
  for (int e = 0; e < 4; ++e) {
    v[e] = rounded_add(rounded_mul(v[e], row.second),
                       rounded_mul(rounded_mul(rates.one_minus2, g[e]), g[e]));
  }
  if (momentum) {
    for (int e = 0; e < 4; ++e) {
      m[e] = rounded_add(rounded_mul(m[e], row.first), rounded_mul(rates.one_minus1, g[e]));
      g[e] = m[e];
    }
  }
  float root[4], change[4];
  for (int e = 0; e < 4; ++e) {
    g[e] = rounded_mul(rates.step_size, g[e]);
    root[e] = rounded_add(rounded_mul(middle_root(v[e]), rates.scale), rates.eps);
    change[e] = middle_quotient(g[e], root[e]);
  }
  const bool middle =
      middle_rates(rates) & middle_squares(v) & middle_numerators(g) & plain_divisors(root);
  if (__builtin_expect(!middle, 0)) {
    for (int e = 0; e < 4; ++e) {
      root[e] = rounded_add(rounded_mul(rounded_sqrt(v[e]), rates.scale), rates.eps);
      change[e] = rounded_div(g[e], root[e]);
    }
  }
  for (int e = 0; e < 4; ++e) w[e] = rounded_sub(w[e], change[e]);
  return middle;
}

// A float64 number as an unevaluated sum: 106 bits.
struct DoubleDouble {
  double high, low;
};

GSF_BOTH DoubleDouble product(DoubleDouble a, DoubleDouble b) {
  const double p = rounded_mul(a.high, b.high);
  double rest = std::fma(a.high, b.high, -p);
  rest = std::fma(a.high, b.low, rest);
  rest = std::fma(a.low, b.high, rest);
  const double high = rounded_add(p, rest);
  return {high, rounded_add(rest, rounded_add(p, -high))};
}

// beta^k for k >= 1, rounded once: the host's own power, which a float64 power on a GPU is not always.
GSF_BOTH double exact_power(double beta, int64_t k) {
  DoubleDouble result = {1.0, 0.0}, square = {beta, 0.0};
  while (true) {
    if ((k & 1) != 0) result = product(result, square);
    k >>= 1;
    if (k == 0) return result.high;
    square = product(square, square);
  }
}

GSF_BOTH float adam_power(double beta, int64_t k) {
  return static_cast<float>(exact_power(beta, k));
}

// Steps since the moments of a row that had a gradient in step `at` (0: never) were brought up to date; tail <= step.
GSF_BOTH int64_t adam_gap(int64_t at, int64_t step, int64_t tail) {
  const int64_t current = at + tail < step - 1 ? at + tail : step - 1;
  return step - current;
}

GSF_BOTH bool adam_live(int64_t at, int64_t step, int64_t tail) {
  return at > 0 && step - at <= tail;
}

}  // namespace gemmascope_fast
