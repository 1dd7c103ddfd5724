// Checked views of the CSR entry arrays and of their feature-major permutation.
//
// Every index is checked here, before an op writes anything: the kernels then read without tests. Positions from
// offsets[n] on are padding; they are neither checked nor read. Errors name the first bad position.
#pragma once

#include <algorithm>
#include <atomic>
#include <optional>

#include "common/check.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace gemmascope_fast {

struct Entries {
  int64_t n = 0, capacity = 0, nnz = 0, d_sae = 0;
  const int64_t* offsets = nullptr;
  const int32_t* indices = nullptr;
  const float* values = nullptr;
  const float* gate = nullptr;
  std::vector<Tensor> keep;  // contiguous copies, where the arrays were not

  // Upper bound of the fraction of latents that have an entry.
  double touched() const {
    return d_sae == 0 ? 0 : std::min(1.0, static_cast<double>(nnz) / static_cast<double>(d_sae));
  }
};

struct FeatureView {
  const int64_t* offsets = nullptr;
  const int64_t* permutation = nullptr;
  std::vector<Tensor> keep;
};

// A contiguous float32 (or other T) vector of `size` elements, kept alive by `keep`.
template <typename T>
const T* vector_data(const char* op, const char* name, const Tensor& t, ScalarType dtype,
                     int64_t size, std::vector<Tensor>* keep) {
  check_dtype(op, name, t, dtype);
  check_shape(op, name, t, {size});
  keep->push_back(contiguous_tensor(t));
  return static_cast<const T*>(keep->back().data_ptr());
}

// The smallest position in [0, count) at which bad(position) holds, or count. Ranges without one cost one scan.
template <typename Bad>
int64_t first_bad(int64_t count, const Bad& bad, int64_t grain = int64_t{1} << 16) {
  std::atomic<int64_t> first{count};
  parallel_ranges(count, grain, [&](int64_t begin, int64_t end) {
    bool any = false;
    for (int64_t i = begin; i < end; ++i) any |= bad(i);
    if (!any) return;
    while (!bad(begin)) ++begin;
    int64_t seen = first.load();
    while (begin < seen && !first.compare_exchange_weak(seen, begin)) {
    }
  });
  return first.load();
}

inline void check_offsets(const char* op, const char* name, const int64_t* offsets, int64_t n,
                          int64_t end, const char* end_name) {
  if (offsets[0] != 0) fail(op, name, "[0] = ", offsets[0], ", expected 0");
  const int64_t i = first_bad(n, [&](int64_t r) { return offsets[r + 1] < offsets[r]; });
  if (i < n) {
    fail(op, name, "[", i + 1, "] = ", offsets[i + 1], " is less than ", name, "[", i,
         "] = ", offsets[i], "; offsets must ascend");
  }
  if (offsets[n] > end) {
    fail(op, name, "[", n, "] = ", offsets[n], " exceeds ", end_name, "=", end);
  }
}

inline Entries check_entries(const char* op, const Tensor& offsets, const Tensor& indices,
                             int64_t d_sae) {
  Entries entries;
  check_dim(op, "offsets", offsets, 1);
  check_dim(op, "indices", indices, 1);
  if (offsets.size(0) < 1) fail(op, "offsets must have n + 1 elements, got shape [0]");
  if (d_sae < 0) fail(op, "d_sae must not be negative, got ", d_sae);
  entries.n = offsets.size(0) - 1;
  entries.capacity = indices.size(0);
  entries.d_sae = d_sae;
  entries.offsets =
      vector_data<int64_t>(op, "offsets", offsets, ScalarType::Long, entries.n + 1, &entries.keep);
  entries.indices = vector_data<int32_t>(op, "indices", indices, ScalarType::Int, entries.capacity,
                                         &entries.keep);
  check_offsets(op, "offsets", entries.offsets, entries.n, entries.capacity, "len(indices)");
  entries.nnz = entries.offsets[entries.n];
  const int32_t* latents = entries.indices;
  const auto bad = [=](int64_t e) {
    return static_cast<uint64_t>(static_cast<int64_t>(latents[e])) >= static_cast<uint64_t>(d_sae);
  };
  const int64_t e = first_bad(entries.nnz, bad);
  if (e < entries.nnz) {
    fail(op, "indices[", e, "] = ", latents[e], " is out of range [0, d_sae=", d_sae, ")");
  }
  return entries;
}

// values, gate, d_values, d_gate: one float32 per position.
inline const float* entry_floats(const char* op, const char* name, const Tensor& t,
                                 Entries* entries) {
  return vector_data<float>(op, name, t, ScalarType::Float, entries->capacity, &entries->keep);
}

inline const float* entry_floats(const char* op, const char* name, const std::optional<Tensor>& t,
                                 Entries* entries) {
  return t.has_value() ? entry_floats(op, name, *t, entries) : nullptr;
}

// The view a caller passed, proven to be by_feature(offsets, indices): inside a latent positions ascend and carry that
// latent, and there are nnz of them in all, so it is a bijection and no pass can write a position twice.
inline FeatureView check_feature_view(const char* op, const Tensor& feature_offsets,
                                      const Tensor& permutation, const Entries& entries) {
  FeatureView view;
  const int64_t d_sae = entries.d_sae, nnz = entries.nnz;
  view.offsets = vector_data<int64_t>(op, "feature_offsets", feature_offsets, ScalarType::Long,
                                      d_sae + 1, &view.keep);
  view.permutation = vector_data<int64_t>(op, "permutation", permutation, ScalarType::Long,
                                          entries.capacity, &view.keep);
  check_offsets(op, "feature_offsets", view.offsets, d_sae, nnz, "offsets[-1]");
  if (view.offsets[d_sae] != nnz) {
    fail(op, "feature_offsets[", d_sae, "] = ", view.offsets[d_sae],
         ", expected offsets[-1]=", nnz);
  }
  const auto bad = [&](int64_t j) {
    int64_t previous = -1;
    for (int64_t p = view.offsets[j]; p < view.offsets[j + 1]; ++p) {
      const int64_t e = view.permutation[p];
      if (e <= previous || e >= nnz || entries.indices[e] != j) return true;
      previous = e;
    }
    return false;
  };
  const int64_t j = first_bad(d_sae, bad, 4096);
  if (j < d_sae) {
    fail(op, "permutation[", view.offsets[j], ":", view.offsets[j + 1],
         "] does not list the entries of latent ", j, " in ascending order");
  }
  return view;
}

// First of `size` items that task `task` of `tasks` handles when cost(i), ascending, is the work before item i.
template <typename Cost>
int64_t balanced_begin(int64_t task, int64_t tasks, int64_t size, const Cost& cost) {
  const double wanted = static_cast<double>(cost(size)) * task / tasks;
  int64_t low = 0, high = size;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (static_cast<double>(cost(middle)) < wanted) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return task >= tasks ? size : low;
}

}  // namespace gemmascope_fast
