// What bounds these passes: one row of W from DRAM per entry; the accumulator and g stay in L1.
//
// Tasks are ranges of tokens with about equally many entries. A batch of fewer tokens than threads is cut along d as
// well, which changes no element's sum. A W whose columns are not contiguous is copied once per call when the entries
// would read more than the copy does (a strided element costs a cache line: 16 times its bytes); else four rows at a
// time are gathered element by element.
#include "cpu/token_pass.h"

#include <cstring>

namespace gemmascope_fast {
namespace {

constexpr int64_t kTasksPerSlot = 8;
constexpr int64_t kMinSlab = 256;

Matrix prepare(const Entries& entries, const Tensor& owner, const Matrix& W, Tensor* keep) {
  return entries.nnz > entries.d_sae / 8 ? gatherable(owner, W, keep) : W;
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

void sum_one(const TokenSum& sum, const Matrix& W, const Matrix& out, const float* bias, int64_t r,
             float* scratch) {
  const int64_t d = W.cols, n = out.rows;
  const bool direct = direct_rows(out) && !sum.add;
  float* acc = direct ? static_cast<float*>(const_cast<void*>(out.row(r))) : scratch;
  float* rows = scratch + d;
  if (bias != nullptr) {
    std::memcpy(acc, bias, static_cast<size_t>(d) * sizeof(float));
  } else {
    std::memset(acc, 0, static_cast<size_t>(d) * sizeof(float));
  }
  for (int64_t row = r; row < n * sum.sets; row += n) {
    add_entries(sum, W, sum.entries->offsets[row], sum.entries->offsets[row + 1], rows, acc);
  }
  if (sum.add) {
    load_rows(out, r, 1, rows, d);
    for (int64_t k = 0; k < d; ++k) acc[k] = rows[k] + acc[k];
  }
  if (!direct) store_rows(out, r, 1, acc, d);
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
  const int64_t parts = std::min(n, slots * kTasksPerSlot);
  const auto cost = [&](int64_t r) {
    int64_t entries = r;
    for (int64_t s = 0; s < sum.sets; ++s) entries += 2 * sum.entries->offsets[s * n + r];
    return entries;
  };
  parallel_tasks(parts * slabs, slots, [&](int64_t task, int64_t) {
    const int64_t part = task / slabs, k = task % slabs * slab, width = std::min(slab, d - k);
    if (width <= 0) return;
    std::vector<float> scratch(static_cast<size_t>(width * (1 + kRowGroup)));
    const Matrix slab_W = columns(W, k, width), slab_out = columns(out, k, width);
    const float* bias = sum.bias == nullptr ? nullptr : sum.bias + k;
    const int64_t end = balanced_begin(part + 1, parts, n, cost);
    for (int64_t r = balanced_begin(part, parts, n, cost); r < end; ++r) {
      sum_one(sum, slab_W, slab_out, bias, r, scratch.data());
    }
  });
}

void dot_tokens(const Entries& entries, const Tensor& W_owner, const Matrix& whole,
                const FloatRows& g, float* out) {
  std::fill(out + entries.nnz, out + entries.capacity, 0.0f);
  if (entries.nnz == 0) return;
  Tensor keep;
  const Matrix W = prepare(entries, W_owner, whole, &keep);
  const int64_t parts = std::min(entries.n, parallel_slots(entries.nnz) * kTasksPerSlot);
  const auto cost = [&](int64_t r) { return 8 * entries.offsets[r] + r; };
  parallel_tasks(parts, [&](int64_t part, int64_t) {
    std::vector<float> rows(static_cast<size_t>(unit_columns(W) ? 0 : W.cols));
    const int64_t end = balanced_begin(part + 1, parts, entries.n, cost);
    for (int64_t r = balanced_begin(part, parts, entries.n, cost); r < end; ++r) {
      const int64_t first = entries.offsets[r], last = entries.offsets[r + 1];
      if (unit_columns(W)) {
        rows_table().gather_dot(row_source(W), entries.indices + first, last - first,
                                entries.nnz - first, W.cols, g.row(r), out + first);
        continue;
      }
      for (int64_t e = first; e < last; ++e) {
        load_rows(W, entries.indices[e], 1, rows.data(), W.cols);
        rows_table().gather_dot(packed_rows(rows.data(), W.cols), kFirstRows, 1, 1, W.cols,
                                g.row(r), out + e);
      }
    }
  });
}

}  // namespace gemmascope_fast
