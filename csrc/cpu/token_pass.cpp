// What bounds these passes: the used rows of W from DRAM, once each where tokens go through ranges of latents together
// (token_runs.h), else once per entry; the accumulator and g stay in L1 or L2.
//
// Tasks are ranges of tokens with about equally many entries. A batch of fewer tokens than threads is cut along d as
// well, which changes no element's sum. A W whose columns are not contiguous is copied once per call when the entries
// would read more than the copy does (a strided element costs a cache line: 16 times its bytes); else four rows at a
// time are gathered element by element.
#include "cpu/token_pass.h"

#include <cstring>

#include "cpu/token_runs.h"

namespace gemmascope_fast {
namespace {

constexpr int64_t kTasksPerSlot = 8;
constexpr int64_t kMinSlab = 256;
// Accumulators of one part that goes through the ranges of latents: they return at every range, from L2 or L3.
constexpr int64_t kPartBytes = int64_t{4} << 20;

Matrix prepare(const Entries& entries, const Tensor& owner, const Matrix& W, Tensor* keep) {
  return entries.nnz > entries.d_sae / 8 ? gatherable(owner, W, keep) : W;
}

int run_shift(const Entries& entries, const Matrix& W) {
  return unit_columns(W) ? range_shift(entries, W.cols * element_size(W.dtype)) : -1;
}

// W's columns [begin, begin + size).
Matrix columns(const Matrix& m, int64_t begin, int64_t size) {
  const char* data = static_cast<const char*>(m.data);
  return {data + begin * m.col_stride * element_size(m.dtype),
          m.dtype,
          m.rows,
          size,
          m.row_stride,
          m.col_stride};
}

const int32_t kFirstRows[kRowGroup] = {0, 1, 2, 3};

RowSource packed_rows(const float* rows, int64_t d) {
  return {rows, 0, d * static_cast<int64_t>(sizeof(float))};
}

// Entries [begin, end) added to acc; `rows` is scratch for a strided W.
void add_entries(const TokenSum& sum, const Matrix& W, int64_t begin, int64_t end, float* rows,
                 float* acc) {
  const int32_t* indices = sum.entries->indices;
  if (unit_columns(W)) {
    rows_table().gather(row_source(W), indices + begin, sum.coef + begin, end - begin,
                        sum.entries->nnz - begin, W.cols, acc);
    return;
  }
  for (int64_t e = begin; e < end; e += kRowGroup) {
    const int64_t count = std::min<int64_t>(kRowGroup, end - e);
    for (int64_t i = 0; i < count; ++i) load_rows(W, indices[e + i], 1, rows + i * W.cols, W.cols);
    rows_table().gather(packed_rows(rows, W.cols), kFirstRows, sum.coef + e, count, count, W.cols,
                        acc);
  }
}

// Where row r of the output accumulates: in place, or in `scratch`.
struct Accumulator {
  const TokenSum& sum;
  const Matrix& out;
  const float* bias;

  bool direct() const { return direct_rows(out) && !sum.add; }
  // Nothing is added to row r: it need not be read.
  bool unchanged(int64_t r) const {
    const int64_t* offsets = sum.entries->offsets;
    return sum.add && sum.sets == 1 && offsets[r] == offsets[r + 1];
  }
  float* start(int64_t r, float* scratch) const {
    float* acc = at(r, scratch);
    const size_t bytes = static_cast<size_t>(out.cols) * sizeof(float);
    if (bias != nullptr) {
      std::memcpy(acc, bias, bytes);
    } else {
      std::memset(acc, 0, bytes);
    }
    return acc;
  }
  float* at(int64_t r, float* scratch) const {
    return direct() ? static_cast<float*>(const_cast<void*>(out.row(r))) : scratch;
  }
  // `rows`: scratch for one row.
  void finish(int64_t r, float* acc, float* rows) const {
    if (sum.add) {
      load_rows(out, r, 1, rows, out.cols);
      for (int64_t k = 0; k < out.cols; ++k) acc[k] = rows[k] + acc[k];
    }
    if (!direct()) store_rows(out, r, 1, acc, out.cols);
  }
};

void sum_one(const Accumulator& to, const Matrix& W, int64_t r, float* scratch) {
  if (to.unchanged(r)) return;
  const TokenSum& sum = to.sum;
  float* rows = scratch + W.cols;
  float* acc = to.start(r, scratch);
  for (int64_t row = r; row < to.out.rows * sum.sets; row += to.out.rows) {
    add_entries(sum, W, sum.entries->offsets[row], sum.entries->offsets[row + 1], rows, acc);
  }
  to.finish(r, acc, rows);
}

// Tokens [begin, end), range of latents by range of latents.
void sum_in_runs(const Accumulator& to, const Matrix& W, int64_t begin, int64_t end, int shift) {
  const int64_t d = W.cols;
  const TokenRuns runs = token_runs(*to.sum.entries, begin, end, shift);
  std::vector<float> scratch(static_cast<size_t>(to.direct() ? 0 : (end - begin + 1) * d));
  for (int64_t r = begin; r < end; ++r) to.start(r, scratch.data() + (r - begin) * d);
  const int32_t* indices = runs.indices.data();
  int64_t left = static_cast<int64_t>(runs.indices.size());
  for (const TokenRun& run : runs.runs) {
    float* acc = to.at(run.row, scratch.data() + (run.row - begin) * d);
    rows_table().gather(row_source(W), indices, to.sum.coef + run.first, run.count, left, d, acc);
    indices += run.count;
    left -= run.count;
  }
  if (to.direct()) return;
  for (int64_t r = begin; r < end; ++r) {
    if (to.unchanged(r)) continue;
    to.finish(r, scratch.data() + (r - begin) * d, scratch.data() + (end - begin) * d);
  }
}

// Parts of the tokens that each go through all ranges: as few as the threads allow, for two parts read a row twice, while
// the accumulators of one stay in the caches.
int64_t run_parts(int64_t n, int64_t d, int64_t slots) {
  const int64_t fitting = kPartBytes / (d * static_cast<int64_t>(sizeof(float))) + 1;
  const int64_t parts = (n + fitting * slots - 1) / (fitting * slots) * slots;
  return std::min(n, parts);
}

}  // namespace

void sum_tokens(const TokenSum& sum, const Matrix& out) {
  const int64_t n = out.rows, d = out.cols;
  if (n == 0 || d == 0) return;
  Tensor keep;
  const Matrix W = prepare(*sum.entries, *sum.W_owner, sum.W, &keep);
  const int64_t slots = parallel_slots(n * d / kMinSlab + 1);
  const int64_t slabs = n >= slots ? 1 : std::min(slots, (d + kMinSlab - 1) / kMinSlab);
  const int64_t slab = (d + slabs * 16 - 1) / (slabs * 16) * 16;
  const int shift = slabs == 1 && sum.sets == 1 ? run_shift(*sum.entries, W) : -1;
  const int64_t parts = shift < 0 ? std::min(n, slots * kTasksPerSlot) : run_parts(n, d, slots);
  const auto cost = [&](int64_t r) {
    int64_t entries = r;
    for (int64_t s = 0; s < sum.sets; ++s) entries += 2 * sum.entries->offsets[s * n + r];
    return entries;
  };
  parallel_tasks(parts * slabs, slots, [&](int64_t task, int64_t) {
    const int64_t part = task / slabs, k = task % slabs * slab, width = std::min(slab, d - k);
    if (width <= 0) return;
    const Matrix slab_W = columns(W, k, width), slab_out = columns(out, k, width);
    const Accumulator to{sum, slab_out, sum.bias == nullptr ? nullptr : sum.bias + k};
    const int64_t begin = balanced_begin(part, parts, n, cost);
    const int64_t end = balanced_begin(part + 1, parts, n, cost);
    if (shift >= 0) return sum_in_runs(to, slab_W, begin, end, shift);
    std::vector<float> scratch(static_cast<size_t>(width * (1 + kRowGroup)));
    for (int64_t r = begin; r < end; ++r) sum_one(to, slab_W, r, scratch.data());
  });
}

namespace {

void dot_in_runs(const Entries& entries, const Matrix& W, const FloatRows& g, int64_t begin,
                 int64_t end, int shift, float* out) {
  const TokenRuns runs = token_runs(entries, begin, end, shift);
  const int32_t* indices = runs.indices.data();
  int64_t left = static_cast<int64_t>(runs.indices.size());
  for (const TokenRun& run : runs.runs) {
    rows_table().gather_dot(row_source(W), indices, run.count, left, W.cols, g.row(run.row),
                            out + run.first);
    indices += run.count;
    left -= run.count;
  }
}

void dot_one(const Entries& entries, const Matrix& W, const FloatRows& g, int64_t r, float* rows,
             float* out) {
  const int64_t first = entries.offsets[r], last = entries.offsets[r + 1];
  if (unit_columns(W)) {
    rows_table().gather_dot(row_source(W), entries.indices + first, last - first,
                            entries.nnz - first, W.cols, g.row(r), out + first);
    return;
  }
  for (int64_t e = first; e < last; ++e) {
    load_rows(W, entries.indices[e], 1, rows, W.cols);
    rows_table().gather_dot(packed_rows(rows, W.cols), kFirstRows, 1, 1, W.cols, g.row(r), out + e);
  }
}

}  // namespace

void dot_tokens(const Entries& entries, const Tensor& W_owner, const Matrix& whole,
                const FloatRows& g, float* out) {
  std::fill(out + entries.nnz, out + entries.capacity, 0.0f);
  if (entries.nnz == 0) return;
  Tensor keep;
  const Matrix W = prepare(entries, W_owner, whole, &keep);
  const int64_t n = entries.n, slots = parallel_slots(entries.nnz);
  const int shift = run_shift(entries, W);
  const int64_t parts =
      shift < 0 ? std::min(n, slots * kTasksPerSlot) : run_parts(n, W.cols, slots);
  const auto cost = [&](int64_t r) { return 8 * entries.offsets[r] + r; };
  parallel_tasks(parts, slots, [&](int64_t part, int64_t) {
    const int64_t begin = balanced_begin(part, parts, n, cost);
    const int64_t end = balanced_begin(part + 1, parts, n, cost);
    if (shift >= 0) return dot_in_runs(entries, W, g, begin, end, shift, out);
    std::vector<float> rows(static_cast<size_t>(unit_columns(W) ? 0 : W.cols));
    for (int64_t r = begin; r < end; ++r) dot_one(entries, W, g, r, rows.data(), out);
  });
}

}  // namespace gemmascope_fast
