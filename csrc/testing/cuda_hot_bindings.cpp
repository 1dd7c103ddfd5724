// The hot/cold split of sae_backward (hot_latents.cuh) on the CPU, over numpy arrays.
#include <pybind11/stl.h>

#include <vector>

#include "common/hot_work.h"
#include "cuda/hot_panels_kernel.cuh"
#include "cuda/hot_product_kernel.cuh"
#include "cuda/hot_select_kernel.cuh"
#include "testing/cuda_passes.h"
#include "testing/registry.h"

namespace gemmascope_fast {
namespace {

constexpr uint16_t kPoison = 0x7fc0;  // NaN

// `a`: feature_offsets, capacity, fewest, worth [9], most, candidates [.], latents [most], slots [d_sae], hot [3].
HotLatents latents_of(const py::dict& a) {
  HotLatents p = {};
  p.feature_offsets = vector_of<int64_t>(a["feature_offsets"]);
  p.d_sae = size_of(a["feature_offsets"]) - 1;
  p.capacity = py::cast<int64_t>(a["capacity"]);
  p.fewest = py::cast<int64_t>(a["fewest"]);
  const auto worth = py::cast<std::vector<int64_t>>(a["worth"]);
  require(worth.size() == kHotTiles + 1, "worth has one number for each count of tiles");
  std::copy(worth.begin(), worth.end(), p.worth);
  p.most = static_cast<int32_t>(size_of(a["latents"]));
  p.most_candidates = static_cast<int32_t>(size_of(a["candidates"]));
  require(size_of(a["hot"]) * 8 == sizeof(HotState), "hot is a HotState");
  p.state = reinterpret_cast<HotState*>(vector_of<int64_t>(a["hot"]));
  p.candidates = vector_of<int32_t>(a["candidates"]);
  p.latents = vector_of<int32_t>(a["latents"]);
  p.slots = vector_of<int32_t>(a["slots"]);
  return p;
}

void select(const py::dict& a) {
  const HotLatents p = latents_of(a);
  cuda_on_cpu::launch<hot_candidates_kernel>(2, kHotThreads, 0, p);
  const int64_t blocks = std::max<int64_t>(1, hot_blocks(p.most_candidates, kHotThreads));
  cuda_on_cpu::launch<hot_rank_kernel>(static_cast<unsigned>(blocks), kHotThreads, 0, p);
  cuda_on_cpu::launch<hot_decide_kernel>(1, kWarp, 0, p);
}

CUtensorMap map(const void* data, int64_t rows, int64_t cols, int64_t stride, int box_rows) {
  return {data, 2, cols, rows, stride, kSm90Depth<__nv_bfloat16>, box_rows};
}

// What hot_backward.cu does, behind `select`; `a` of the pass (cuda_passes.h).
struct Split {
  HotLatents p;
  FeaturePass pass;
  int64_t tokens;
  unsigned rows;

  void transpose(const Rows& from, std::vector<uint16_t>& to) const {
    const dim3 squares(static_cast<unsigned>(hot_blocks(from.rows, kHotSquare)),
                       static_cast<unsigned>(hot_blocks(from.cols, kHotSquare)));
    const HotTranspose turned = {from, to.data(), tokens, p.state};
    cuda_on_cpu::launch<hot_transpose_kernel>(squares, kHotThreads, 0, turned);
  }

  // Two CTAs, so that they loop.
  template <int kTerms>
  void multiply(const HotProduct& product, const CUtensorMap& left,
                const CUtensorMap& right) const {
    cuda_on_cpu::launch<hot_product_kernel<kTerms>>(2, kSm90Threads, kSm90SharedBytes, left, right,
                                                    product);
  }

  void sum(const std::vector<uint16_t>& panel, const std::vector<uint16_t>& turned,
           const Target& out) const {
    const HotProduct product = {p.state,
                                p.latents,
                                out.cols,
                                pass.n,
                                tokens,
                                nullptr,
                                static_cast<uint16_t*>(out.data),
                                out.row_stride};
    multiply<2>(product, map(panel.data(), p.most, 2 * tokens, 2 * tokens, kHotTile),
                map(turned.data(), out.cols, pass.n, tokens, kSm90Latents));
  }
};

void backward(const py::dict& chosen, const py::dict& a) {
  StoreGradients gradients = {};
  Split s = {latents_of(chosen), pass_of(a, &gradients), 0, 0};
  const FeaturePass& pass = s.pass;
  require(pass.g.wide && pass.x.wide && pass.W_dec.wide, "wide rows");
  s.tokens = hot_tokens(pass.n);
  s.rows = static_cast<unsigned>(s.p.most);
  const auto halves = [](int64_t size) {
    return std::vector<uint16_t>(static_cast<size_t>(size), kPoison);
  };
  const int64_t most = s.p.most, widest = std::max(pass.g.cols, pass.x.cols);
  std::vector<uint16_t> turned = halves(widest * s.tokens), W_hot = halves(most * pass.g.cols);
  std::vector<uint16_t> values = halves(most * 2 * s.tokens), d_pre = values;
  std::vector<float> dots(static_cast<size_t>(most * s.tokens), NAN);
  s.transpose(pass.g, turned);
  const HotGather gather = {pass.W_dec, W_hot.data(), s.p.latents, s.p.state};
  cuda_on_cpu::launch<hot_gather_kernel>(s.rows, kHotThreads, 0, gather);
  const HotProduct product = {s.p.state, s.p.latents, pass.n,  pass.g.cols,
                              s.tokens,  dots.data(), nullptr, s.tokens};
  s.multiply<1>(product, map(W_hot.data(), most, pass.g.cols, pass.g.cols, kHotTile),
                map(pass.g.data, pass.g.rows, pass.g.cols, pass.g.row_stride, kSm90Latents));
  const HotPanels panels = {dots.data(), values.data(), d_pre.data(), s.tokens,
                            s.p.latents, s.p.slots,     s.p.state};
  cuda_on_cpu::launch<hot_fill_kernel>(s.rows, kHotThreads, 0, pass, panels);
  s.sum(values, turned, gradients.d_W_dec);
  s.transpose(pass.x, turned);
  s.sum(d_pre, turned, gradients.d_W_enc);
}

py::tuple work(int64_t n, int64_t d_in, int64_t d_out, int64_t d_sae, int64_t processors) {
  const HotShape shape = {n, d_in, d_out, d_sae, processors};
  std::vector<int64_t> worth;
  for (int64_t tiles = 1; tiles <= kHotMostTiles; ++tiles) {
    worth.push_back(hot_worth(shape, tiles));
  }
  return py::make_tuple(hot_most(shape), worth, hot_bytes(shape));
}

bool expected(int64_t n, int64_t d_in, int64_t d_out, int64_t d_sae, int64_t processors,
              int64_t entries) {
  return hot_expected({n, d_in, d_out, d_sae, processors}, entries);
}

const BindLater later([](py::module_& m) {
  m.def("cuda_hot_select", &select);
  m.def("cuda_hot_backward", &backward);
  m.def("cuda_hot_work", &work);
  m.def("cuda_hot_share", &hot_share);
  m.def("cuda_hot_expected", &expected);
});

}  // namespace
}  // namespace gemmascope_fast
