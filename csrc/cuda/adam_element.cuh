// Adam on one element, and what its row decides: plain arithmetic, the same on host and device.
//
//   g' = g - share w;  m = m decay1 + one_minus1 g';  v = v decay2 + (one_minus2 g') g'
//   w = w - (step_size m) / (sqrt(v) scale + eps)
//
// Every operation is rounded on its own, in this order, root and quotient correctly: the bits of every other backend.
#pragma once

#include "cuda/rounded.cuh"

namespace gemmascope_fast {

// The numbers of one step of one matrix.
struct AdamRates {
  float step_size, one_minus1, one_minus2, scale, eps;
};

// The numbers of one row; share: how much of w is in g, 0 without remove_parallel.
struct AdamDecays {
  float first, second, share;
};

// m is read and written only with a first moment.
GSF_BOTH void adam_element(const AdamRates& rates, const AdamDecays& row, bool momentum, float g,
                           float* m, float* v, float* w) {
  if (row.share != 0.0f) g = rounded_sub(g, rounded_mul(row.share, *w));  // NaN included
  const float second =
      rounded_add(rounded_mul(*v, row.second), rounded_mul(rounded_mul(rates.one_minus2, g), g));
  float first = g;
  if (momentum) {
    first = rounded_add(rounded_mul(*m, row.first), rounded_mul(rates.one_minus1, g));
    *m = first;
  }
  const float root = rounded_add(rounded_mul(rounded_sqrt(second), rates.scale), rates.eps);
  *v = second;
  *w = rounded_sub(*w, rounded_div(rounded_mul(rates.step_size, first), root));
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
