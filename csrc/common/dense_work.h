// Sums over entries and their dot products: what they cost as a pass and as a dense product. The derivation is in
// kernels/dense.py, whose numbers these are, for the compiled passes: their rates differ by the order they walk in, and
// their launches cost nothing beside those of a product, which come from Python.
#pragma once

#include <algorithm>
#include <vector>

#include "common/matrix.h"

namespace gemmascope_fast {

constexpr double kDenseMargin = 1.5;    // how many times faster a product must be expected to be
constexpr double kDenseSeconds = 1e-4;  // about 15 launches from Python: modelled, not measured
constexpr int64_t kDenseChunkBytes = int64_t{1} << 27;  // the largest dense piece
constexpr int64_t kDenseLargestMatrix = int64_t{1}
                                        << 29;  // elements that may be copied for a product

enum class Walk { kTokens = 0, kLatents = 1 };

// Bytes and operations are doubles: they pass 2^63.
struct DenseWork {
  double gathered;    // bytes that the pass reads
  double moved;       // bytes that the product reads and writes
  double operations;  // of the product
  bool wide;          // multiplied in float32
  Walk walk;          // the order of the pass
  int64_t elements;   // of the matrix
};

// One row of what set_rates is given: a compute capability (90 for 9.0) and what it reaches.
struct DenseRates {
  double architecture, teraflops_16, teraflops_32, gigabytes, token_gigabytes, latent_gigabytes;
};

inline double dense_chunks(int64_t n, int64_t features, int64_t d, int64_t size, int64_t parts) {
  const int64_t row = parts * std::max({features * size, d * 4, int64_t{1}});
  const int64_t rows = std::max<int64_t>(1, std::min(n, kDenseChunkBytes / row));
  return static_cast<double>((n + rows - 1) / rows);
}

// out [n, d] from rows of matrix [features, d].
inline DenseWork sum_work(Walk walk, int64_t capacity, int64_t n, int64_t features, int64_t d,
                          Dtype matrix, Dtype result) {
  const bool wide = matrix != Dtype::kBFloat16;
  const int64_t size = wide ? 4 : 2;
  const int64_t parts = wide ? 1 : result == Dtype::kFloat32 ? 3 : 2;
  const double entries = static_cast<double>(capacity), rows = static_cast<double>(n);
  const double F = static_cast<double>(features), cols = static_cast<double>(d);
  const double copies = (dense_chunks(n, features, d, size, parts) + 3) * F * cols * size;
  const double pieces = 2.0 * parts * rows * (F * size + cols * 4);
  return {entries * static_cast<double>(d * element_size(matrix) + 8),
          copies + pieces + 24 * entries,
          2.0 * parts * rows * F * cols,
          wide,
          walk,
          features * d};
}

// One number per entry from W [features, d] and g [n, d].
inline DenseWork dots_work(int64_t capacity, int64_t n, int64_t features, int64_t d, Dtype W,
                           Dtype g) {
  const bool wide = W != g || W == Dtype::kFloat32;
  const int64_t size = wide ? 4 : 2;
  const double entries = static_cast<double>(capacity), rows = static_cast<double>(n);
  const double F = static_cast<double>(features), cols = static_cast<double>(d);
  return {entries * static_cast<double>(d * element_size(W) + 8),
          (dense_chunks(n, features, d, 4, 1) + 2) * F * cols * size + 8 * rows * F + 40 * entries,
          2 * rows * F * cols,
          wide,
          Walk::kLatents,
          features * d};
}

// All of `works` together are clearly faster as dense products.
inline bool dense_pays(const DenseRates& rates, const std::vector<DenseWork>& works) {
  double passes = 0, products = 0;
  for (const DenseWork& work : works) {
    if (work.operations == 0 || work.elements > kDenseLargestMatrix) return false;
    const bool tokens = work.walk == Walk::kTokens;
    passes += work.gathered / ((tokens ? rates.token_gigabytes : rates.latent_gigabytes) * 1e9);
    products += kDenseSeconds + work.moved / (rates.gigabytes * 1e9) +
                work.operations / ((work.wide ? rates.teraflops_32 : rates.teraflops_16) * 1e12);
  }
  return passes > kDenseMargin * products;
}

// The row of the newest architecture that is not newer than this one: row 0 has architecture 0.
inline DenseRates rates_of(const std::vector<DenseRates>& table, double architecture) {
  DenseRates best = table.at(0);
  for (const DenseRates& row : table) {
    if (row.architecture <= architecture && row.architecture > best.architecture) best = row;
  }
  return best;
}

inline std::vector<DenseRates> rates_table(const std::vector<double>& numbers) {
  constexpr size_t kColumns = sizeof(DenseRates) / sizeof(double);
  if (numbers.empty() || numbers.size() % kColumns != 0 || numbers[0] != 0) {
    fail("set_rates", "expected rows of ", kColumns, " numbers, the first for architecture 0");
  }
  std::vector<DenseRates> table;
  for (const double* row = numbers.data(); row != numbers.data() + numbers.size();
       row += kColumns) {
    table.push_back({row[0], row[1], row[2], row[3], row[4], row[5]});
  }
  return table;
}

}  // namespace gemmascope_fast
