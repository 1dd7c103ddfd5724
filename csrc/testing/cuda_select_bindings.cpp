// The selection kernels of topk_encode and batchtopk_encode on the CPU (cuda_on_cpu.h), over numpy arrays: one merge or
// one output pass each. Candidates, and how many there were, are the test's choice.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cuda/select_batch_kernel.cuh"
#include "cuda/select_prefixes.h"
#include "cuda/select_rows_kernel.cuh"
#include "cuda/topk_few_kernel.cuh"
#include "testing/cuda_on_cpu.h"
#include "testing/registry.h"

namespace gemmascope_fast {
namespace {

namespace py = pybind11;
template <class T>
using In = py::array_t<T, py::array::c_style | py::array::forcecast>;
template <class T>
using InOut = py::array_t<T, py::array::c_style>;
constexpr unsigned kMostBlocks = 3;  // so that blocks loop

void require(bool ok, const char* message) {
  if (!ok) throw py::value_error(message);
}

template <class T>
py::array_t<T> poisoned(std::vector<py::ssize_t> shape) {
  py::array_t<T> result(std::move(shape));
  memset(result.mutable_data(), 0xAB, static_cast<size_t>(result.nbytes()));
  return result;
}

// offsets [n + 1], latents, values, needed, capacity, first, lost [1]
struct FoundArrays {
  In<int64_t> offsets;
  In<int32_t> latents;
  In<float> values;
  int64_t needed;
  Found found;

  FoundArrays(const py::tuple& t, InOut<int64_t>& lost)
      : offsets(t[0]), latents(t[1]), values(t[2]), needed(t[3].cast<int64_t>()) {
    require(offsets.size() > 0 && offsets.at(offsets.size() - 1) <= latents.size() &&
                latents.size() == values.size() && lost.size() == 1,
            "sizes differ");
    found = {offsets.data(),       latents.data(),       values.data(),      &needed,
             t[4].cast<int64_t>(), t[5].cast<int64_t>(), lost.mutable_data()};
  }
};

void select_rows(const std::string& team, InOut<int32_t> latents, InOut<float> values,
                 InOut<int32_t> counts, InOut<float> bound, const py::tuple& candidates,
                 InOut<int64_t> lost) {
  FoundArrays arrays(candidates, lost);
  require(latents.ndim() == 2 && values.size() == latents.size(), "[n, k]");
  SelectRows p;
  p.found = arrays.found;
  p.n = latents.shape(0);
  p.k = latents.shape(1);
  require(counts.size() == p.n && bound.size() == p.n && arrays.offsets.size() == p.n + 1, "n");
  p.latents = latents.mutable_data();
  p.values = values.mutable_data();
  p.counts = counts.mutable_data();
  p.bound = bound.mutable_data();
  const unsigned fours = std::min(grid_of((p.n + 3) / 4), kMostBlocks);
  const unsigned ones = std::min(grid_of(p.n), kMostBlocks);
  if (team == "warp") {
    cuda_on_cpu::launch<select_rows_kernel<1, kWarpRows, kWarpKeys>>(fours, 128, 0, p);
  } else if (team == "warp, from memory") {
    cuda_on_cpu::launch<select_rows_kernel<1, 4, 32>>(fours, 128, 0, p);
  } else if (team == "block") {
    cuda_on_cpu::launch<select_rows_kernel<kBlockWarps, 1, kBlockKeys>>(ones, 256, 0, p);
  } else if (team == "block, from memory") {
    cuda_on_cpu::launch<select_rows_kernel<8, 1, 64>>(ones, 256, 0, p);
  } else {
    throw py::value_error(team);
  }
}

py::tuple fill_rows(const In<int32_t>& latents, const In<float>& values, const In<int32_t>& counts,
                    const In<int64_t>& lost, int64_t d_sae, int64_t together,
                    const std::optional<In<int64_t>>& which, int64_t rows) {
  const py::ssize_t n = latents.shape(0), k = latents.shape(1), all = which ? rows : n;
  require(values.size() == n * k && counts.size() == n && together > 0 &&
              (n + together - 1) / together <= lost.size(),
          "[n, k], [n], [blocks]");
  auto offsets = poisoned<int64_t>({all + 1});
  auto out_latents = poisoned<int32_t>({all * k});
  auto out_values = poisoned<float>({all * k}), gate = poisoned<float>({all * k});
  FillRows p;
  p.latents = latents.data();
  p.values = values.data();
  p.counts = counts.data();
  p.lost = lost.data();
  p.n = n;
  p.k = k;
  p.d_sae = d_sae;
  p.together = together;
  p.which = which ? which->data() : nullptr;
  p.offsets = offsets.mutable_data();
  p.out_latents = out_latents.mutable_data();
  p.out_values = out_values.mutable_data();
  p.gate = gate.mutable_data();
  cuda_on_cpu::launch<fill_rows_kernel>(std::min(grid_of((n + 7) / 8), kMostBlocks), kFillThreads,
                                        0, p);
  return py::make_tuple(offsets, out_latents, out_values, gate);
}

// keys [n, groups, 32], highest [n, groups]; row i becomes row which[i] of `rows`.
py::tuple topk_few(const In<uint32_t>& keys, const In<uint32_t>& highest, int64_t k, bool in_memory,
                   const std::optional<In<int64_t>>& which, int64_t rows) {
  const py::ssize_t n = highest.shape(0), groups = highest.shape(1), all = which ? rows : n;
  require(keys.size() == n * groups * kGroup, "[n, groups, 32]");
  std::vector<uint32_t> own(highest.data(), highest.data() + highest.size());
  auto chosen = poisoned<int32_t>({n, groups}), latents = poisoned<int32_t>({n, k});
  auto out_latents = poisoned<int32_t>({all * k});
  auto values = poisoned<float>({n, k}), bound = poisoned<float>({n});
  auto out_values = poisoned<float>({all * k}), gate = poisoned<float>({all * k});
  auto offsets = poisoned<int64_t>({all + 1});
  std::vector<int32_t> counts(static_cast<size_t>(n),
                              static_cast<int32_t>(k));  // of an earlier call
  TopkFew p = {};
  p.of = {const_cast<uint32_t*>(keys.data()), own.data(), groups};
  p.chosen = chosen.mutable_data();
  p.best.n = p.fill.n = n;
  p.best.k = p.fill.k = k;
  p.fill.latents = p.best.latents = latents.mutable_data();
  p.fill.values = p.best.values = values.mutable_data();
  p.fill.counts = p.best.counts = counts.data();
  p.best.bound = bound.mutable_data();
  p.fill.which = which ? which->data() : nullptr;
  p.fill.offsets = offsets.mutable_data();
  p.fill.out_latents = out_latents.mutable_data();
  p.fill.out_values = out_values.mutable_data();
  p.fill.gate = gate.mutable_data();
  const unsigned blocks = static_cast<unsigned>(n), threads = 32 * kTopkFewWarps;
  if (in_memory) {
    cuda_on_cpu::launch<topk_few_kernel<4>>(blocks, threads, 0, p);
  } else {
    cuda_on_cpu::launch<topk_few_kernel<kTopkFewKeys>>(blocks, threads, 0, p);
  }
  return py::make_tuple(offsets, out_latents, out_values, gate);
}

// The candidates are those of rows first_row and on.
py::tuple select_batch(const In<int64_t>& kept_offsets, const In<int32_t>& kept_latents,
                       const In<float>& kept_values, int64_t rank, const py::tuple& candidates,
                       InOut<int64_t> lost, int64_t first_row) {
  FoundArrays arrays(candidates, lost);
  const py::ssize_t n = kept_offsets.size() - 1;
  const py::ssize_t capacity = kept_latents.size(), rows = arrays.offsets.size() - 1;
  require(kept_values.size() == capacity && first_row >= 0 && first_row + rows <= n &&
              std::min(rank, kept_offsets.at(n) + arrays.offsets.at(rows)) <= capacity,
          "room for what is selected");
  std::vector<unsigned long long> histograms(kBatchLevels * kBatchBins);
  auto above = poisoned<int64_t>({n}), equal = poisoned<int64_t>({n});
  std::vector<BatchCut> cuts(kBatchLevels + 1, {~0ull, ~0ull});
  auto offsets = poisoned<int64_t>({n + 1});
  auto latents = poisoned<int32_t>({capacity});
  auto values = poisoned<float>({capacity}), bound = poisoned<float>({n}),
       threshold = poisoned<float>({});
  SelectBatch p;
  p.found = arrays.found;
  p.first_row = first_row;
  p.rows = rows;
  p.n = n;
  p.rank = rank;
  p.kept_offsets = kept_offsets.data();
  p.kept_latents = kept_latents.data();
  p.kept_values = kept_values.data();
  p.histograms = histograms.data();
  p.cuts = cuts.data();
  p.above = above.mutable_data();
  p.equal = equal.mutable_data();
  p.offsets = offsets.mutable_data();
  p.latents = latents.mutable_data();
  p.values = values.mutable_data();
  p.bound = bound.mutable_data();
  p.threshold = threshold.mutable_data();
  for (int level = 0; level < kBatchLevels; ++level) {
    cuda_on_cpu::launch<select_batch_histogram_kernel>(kMostBlocks, kBatchThreads, 0, p, level);
  }
  cuda_on_cpu::launch<select_batch_count_kernel>(kMostBlocks, kBatchThreads, 0, p);
  cuda_on_cpu::launch<select_batch_scan_kernel>(1, kScanThreads, 0, p);
  cuda_on_cpu::launch<select_batch_place_kernel>(kMostBlocks, kBatchThreads, 0, p);
  return py::make_tuple(offsets, latents, values, bound, threshold);
}

py::tuple write_batch(const In<int64_t>& kept_offsets, const In<int32_t>& kept_latents,
                      const In<float>& kept_values, const In<int64_t>& lost, int64_t d_sae,
                      int64_t capacity) {
  const py::ssize_t n = kept_offsets.size() - 1;
  auto offsets = poisoned<int64_t>({n + 1}), needed = poisoned<int64_t>({});
  auto latents = poisoned<int32_t>({capacity});
  auto values = poisoned<float>({capacity}), gate = poisoned<float>({capacity});
  WriteBatch p;
  p.kept_offsets = kept_offsets.data();
  p.kept_latents = kept_latents.data();
  p.kept_values = kept_values.data();
  p.lost = lost.data();
  p.blocks = lost.size();
  p.n = n;
  p.d_sae = d_sae;
  p.capacity = capacity;
  p.offsets = offsets.mutable_data();
  p.latents = latents.mutable_data();
  p.values = values.mutable_data();
  p.gate = gate.mutable_data();
  p.needed = needed.mutable_data();
  cuda_on_cpu::launch<write_batch_kernel>(kMostBlocks, kBatchThreads, 0, p);
  return py::make_tuple(offsets, latents, values, gate, needed);
}

py::list borders(const std::vector<Prefix>& chunks) {
  py::list all;
  for (const Prefix& chunk : chunks) all.append(py::make_tuple(chunk.first, chunk.last));
  return all;
}

const BindLater later([](py::module_& module) {
  py::module_ m = module.def_submodule("cuda_select");
  m.def("select_rows", &select_rows);
  m.def("fill_rows", &fill_rows, py::arg("latents"), py::arg("values"), py::arg("counts"),
        py::arg("lost"), py::arg("d_sae"), py::arg("together"), py::arg("which") = py::none(),
        py::arg("rows") = 0);
  m.def("topk_few", &topk_few, py::arg("keys"), py::arg("highest"), py::arg("k"),
        py::arg("in_memory"), py::arg("which") = py::none(), py::arg("rows") = 0);
  m.def("select_batch", &select_batch);
  m.def("write_batch", &write_batch);
  m.def("first_prefix", &first_prefix, py::arg("n"), py::arg("k"));
  m.def("rows_at_once", &rows_at_once, py::arg("n"), py::arg("width"));
  m.def("prefix_growth", &prefix_growth, py::arg("n"), py::arg("k"), py::arg("width"));
  m.def("prefixes", [](int64_t d_sae, int64_t width, int64_t growth) {
    return borders(prefixes(d_sae, width, growth));
  });
  m.def("equal_chunks", [](int64_t begin, int64_t d_sae, int64_t width) {
    return borders(equal_chunks(begin, d_sae, width));
  });
});

}  // namespace
}  // namespace gemmascope_fast
