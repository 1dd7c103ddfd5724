#include "cpu/token_runs.h"

#include "cpu/simd/row.h"

namespace gemmascope_fast {
namespace {

// Rows of one range, read by all tokens before the next: together with the accumulators well inside an L3 cache.
constexpr int64_t kRangeBytes = int64_t{16} << 20;

// Calls visit(range, row, first, count) for every run of tokens [begin, end).
template <typename Visit>
void visit_runs(const Entries& entries, int64_t begin, int64_t end, int shift, const Visit& visit) {
  const int32_t* indices = entries.indices;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t last = entries.offsets[r + 1];
    for (int64_t e = entries.offsets[r]; e < last;) {
      const int64_t first = e, range = indices[e] >> shift;
      for (++e; e < last && (indices[e] >> shift) <= range; ++e) {
      }
      visit(range, r, first, e - first);
    }
  }
}

}  // namespace

int range_shift(const Entries& entries, int64_t row_bytes) {
  if (entries.n == 0 || entries.nnz < entries.d_sae / 2) return -1;
  const int64_t ranges =
      std::min(entries.nnz / (entries.n * kRowGroup), entries.nnz * row_bytes / kRangeBytes);
  int shift = 0;
  while ((entries.d_sae >> shift) > ranges) ++shift;
  return (entries.d_sae >> shift) > 1 ? shift : -1;
}

TokenRuns token_runs(const Entries& entries, int64_t begin, int64_t end, int shift) {
  const size_t ranges = static_cast<size_t>((entries.d_sae >> shift) + 1);
  std::vector<int64_t> runs(ranges + 1), sizes(ranges + 1);
  visit_runs(entries, begin, end, shift, [&](int64_t range, int64_t, int64_t, int64_t count) {
    ++runs[static_cast<size_t>(range) + 1];
    sizes[static_cast<size_t>(range) + 1] += count;
  });
  for (size_t i = 1; i <= ranges; ++i) {
    runs[i] += runs[i - 1];
    sizes[i] += sizes[i - 1];
  }
  TokenRuns found;
  found.runs.resize(static_cast<size_t>(runs[ranges]));
  found.indices.resize(static_cast<size_t>(sizes[ranges]));
  visit_runs(entries, begin, end, shift,
             [&](int64_t range, int64_t row, int64_t first, int64_t count) {
               const size_t at = static_cast<size_t>(range);
               found.runs[static_cast<size_t>(runs[at]++)] = {row, first, count};
               std::copy_n(entries.indices + first, count, found.indices.data() + sizes[at]);
               sizes[at] += count;
             });
  return found;
}

}  // namespace gemmascope_fast
