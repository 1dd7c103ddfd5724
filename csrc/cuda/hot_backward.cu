#include <cstdlib>
#include <cstring>

#include "common/hot_work.h"
#include "cuda/hot_backward.h"
#include "cuda/hot_panels_kernel.cuh"
#include "cuda/hot_product_kernel.cuh"
#include "cuda/hot_select_kernel.cuh"
#include "cuda/sm90_device.h"

namespace gemmascope_fast {
namespace {

static_assert(kHotTile == kHotTileRows && kHotTiles == kHotMostTiles);
static_assert(kSm90Latents == kHotTileColumns);

constexpr Sm90Element kElement = {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2};
constexpr const char* kChoice = "GEMMASCOPE_FAST_SPLIT";

enum class Mode { kAuto, kAlways, kNever };

Mode mode_of_environment(const char* op) {
  const char* choice = std::getenv(kChoice);
  if (choice == nullptr || choice[0] == '\0') return Mode::kAuto;
  if (std::strcmp(choice, "always") == 0) return Mode::kAlways;
  if (std::strcmp(choice, "never") == 0) return Mode::kNever;
  fail(op, kChoice, "=", choice, ": expected always or never");
  return Mode::kAuto;
}

Sm90Device this_device() {
  static Sm90Devices devices({reinterpret_cast<const void*>(&hot_product_kernel<1>),
                              reinterpret_cast<const void*>(&hot_product_kernel<2>)},
                             kSm90SharedBytes);
  return devices.current();
}

bool takes(const Rows& m) {
  return m.wide && m.dtype == kBFloat16 && m.rows > 0 && m.cols > 0 &&
         sm90_rows_fit(kElement, m.data, m.rows, m.cols, m.row_stride);
}

bool takes(const Target& t) {
  return t.data != nullptr &&
         takes(Rows{t.data, t.rows, t.cols, t.row_stride, t.col_stride, t.dtype, t.wide});
}

// One split: what all its launches share.
class Split {
 public:
  Split(const char* op, const SaeInputs& in, const Rows& g, const FeaturePass& pass,
        const Sm90Device& device, const HotShape& shape, const Tensor& like)
      : op_(op), g_(g), pass_(pass), device_(device), shape_(shape), like_(like) {
    stream_ = current_stream(op, like);
    tokens_ = hot_tokens(in.n);
    most_ = hot_most(shape);
  }

  HotSplit choose(Mode mode) {
    HotSplit kept;
    kept.state = torch::stable::new_zeros(
        like_, {static_cast<int64_t>(sizeof(HotState) / sizeof(int64_t))}, ScalarType::Long);
    kept.slots = ints(shape_.d_sae);
    latents_ = ints(most_);
    HotLatents p = {};
    p.feature_offsets = pass_.feature_offsets;
    p.d_sae = shape_.d_sae;
    p.capacity = pass_.capacity;
    p.fewest = mode == Mode::kAlways ? 1 : std::max<int64_t>(1, shape_.n / kHotShare);
    for (int64_t tiles = 1; tiles <= kHotMostTiles; ++tiles) {
      p.worth[tiles] = mode == Mode::kAlways ? 0 : hot_worth(shape_, tiles);
    }
    p.most = static_cast<int32_t>(most_);
    p.most_candidates = static_cast<int32_t>(std::min(shape_.d_sae, p.capacity / p.fewest));
    const Tensor candidates = ints(p.most_candidates);
    p.state = static_cast<HotState*>(kept.state.data_ptr());
    p.candidates = static_cast<int32_t*>(candidates.data_ptr());
    p.latents = static_cast<int32_t*>(latents_.data_ptr());
    p.slots = static_cast<int32_t*>(kept.slots.data_ptr());
    hot_candidates_kernel<<<blocks(std::min<int64_t>(shape_.d_sae, 1 << 20)), kHotThreads, 0,
                            stream_>>>(p);
    check_launch(op_);
    hot_rank_kernel<<<blocks(p.most_candidates), kHotThreads, 0, stream_>>>(p);
    check_launch(op_);
    hot_decide_kernel<<<1, kWarp, 0, stream_>>>(p);
    check_launch(op_);
    state_ = p.state;
    slots_ = p.slots;
    return kept;
  }

  void multiply(const SaeInputs& in, const StoreGradients& gradients) {
    const Rows x = rows_of(in.x);
    const Tensor turned = halves(std::max(shape_.d_in, shape_.d_out) * tokens_);
    const Tensor W_hot = halves(most_ * shape_.d_out);
    const Tensor dots = new_floats(like_, most_ * tokens_);
    const Tensor values = halves(most_ * 2 * tokens_), d_pre = halves(most_ * 2 * tokens_);
    transpose(g_, turned);
    const HotGather gather = {pass_.W_dec, bits(W_hot), latents(), state_};
    hot_gather_kernel<<<rows(), kHotThreads, 0, stream_>>>(gather);
    check_launch(op_);
    HotProduct dot = product(shape_.n, shape_.d_out, tokens_);
    dot.dots = mutable_floats(dots);
    run(&hot_product_kernel<1>, dot, map(bits(W_hot), most_, shape_.d_out, shape_.d_out, kHotTile),
        map(g_.data, g_.rows, g_.cols, g_.row_stride, kSm90Latents));
    const HotPanels panels = {floats(dots), bits(values), bits(d_pre), tokens_,
                              latents(),    slots_,       state_};
    hot_fill_kernel<<<rows(), kHotThreads, 0, stream_>>>(pass_, panels);
    check_launch(op_);
    sum(values, turned, shape_.d_out, gradients.d_W_dec);
    transpose(x, turned);
    sum(d_pre, turned, shape_.d_in, gradients.d_W_enc);
  }

 private:
  Tensor ints(int64_t size) const {
    return torch::stable::new_empty(like_, {size}, ScalarType::Int);
  }
  Tensor halves(int64_t size) const {
    return torch::stable::new_empty(like_, {size}, ScalarType::BFloat16);
  }
  static uint16_t* bits(const Tensor& t) { return static_cast<uint16_t*>(t.data_ptr()); }
  const int32_t* latents() const { return static_cast<const int32_t*>(latents_.data_ptr()); }
  static unsigned blocks(int64_t threads) {
    return static_cast<unsigned>(std::max<int64_t>(1, hot_blocks(threads, kHotThreads)));
  }
  unsigned rows() const { return static_cast<unsigned>(most_); }

  void transpose(const Rows& from, const Tensor& to) const {
    const dim3 squares(static_cast<unsigned>(hot_blocks(from.rows, kHotSquare)),
                       static_cast<unsigned>(hot_blocks(from.cols, kHotSquare)));
    const HotTranspose p = {from, bits(to), tokens_, state_};
    hot_transpose_kernel<<<squares, kHotThreads, 0, stream_>>>(p);
    check_launch(op_);
  }

  CUtensorMap map(const void* data, int64_t rows, int64_t cols, int64_t stride,
                  int64_t box_rows) const {
    CUtensorMap made;
    const bool ok =
        sm90_map(device_, &made, kElement, data, rows, cols, stride, static_cast<int>(box_rows));
    check_cuda(op_, "tensor map", ok ? cudaSuccess : cudaErrorInvalidValue);
    return made;
  }

  HotProduct product(int64_t columns, int64_t depth, int64_t stride) const {
    return {state_, latents(), columns, depth, tokens_, nullptr, nullptr, stride};
  }

  // rows of `out` at the hot latents = panel [most, 2 tokens] times turned [cols, tokens], transposed.
  void sum(const Tensor& panel, const Tensor& turned, int64_t cols, const Target& out) const {
    HotProduct p = product(cols, shape_.n, out.row_stride);
    p.rows = static_cast<uint16_t*>(out.data);
    run(&hot_product_kernel<2>, p, map(bits(panel), most_, 2 * tokens_, 2 * tokens_, kHotTile),
        map(bits(turned), cols, shape_.n, tokens_, kSm90Latents));
  }

  void run(void (*kernel)(CUtensorMap, CUtensorMap, HotProduct), const HotProduct& p,
           const CUtensorMap& left, const CUtensorMap& right) const {
    const int64_t tiles = most_ / kHotTile * hot_blocks(p.columns, kSm90Latents);
    kernel<<<static_cast<unsigned>(std::min<int64_t>(tiles, device_.processors)), kSm90Threads,
             kSm90SharedBytes, stream_>>>(left, right, p);
    check_launch(op_);
  }

  const char* op_;
  const Rows g_;
  const FeaturePass& pass_;
  const Sm90Device device_;
  const HotShape shape_;
  const Tensor& like_;
  cudaStream_t stream_;
  int64_t tokens_, most_;
  Tensor latents_;
  HotState* state_ = nullptr;
  int32_t* slots_ = nullptr;
};

}  // namespace

std::optional<HotSplit> split_hot(const char* op, const SaeInputs& in,
                                  const StoreGradients& gradients, const Tensor& like,
                                  FeaturePass* pass) {
  const Mode mode = mode_of_environment(op);
  if (mode == Mode::kNever || in.sets != 1 || in.group_ends.size() != 1) return std::nullopt;
  const Tensor own = adjacent_columns(torch::stable::select(in.d_recon, 0, 0));
  const Rows g = rows_of(own);
  if (!takes(g) || !takes(rows_of(in.x)) || !takes(pass->W_dec) || !takes(gradients.d_W_dec) ||
      !takes(gradients.d_W_enc) || pass->capacity == 0) {
    return std::nullopt;
  }
  const Sm90Device device = this_device();
  if (!device.serves) return std::nullopt;
  const HotShape shape = {in.n, in.x.size(1), g.cols, in.d_sae, device.processors};
  if (hot_bytes(shape) > kHotLargest) return std::nullopt;
  if (mode == Mode::kAuto && !hot_expected(shape, pass->capacity)) return std::nullopt;
  Split split(op, in, g, *pass, device, shape, like);
  HotSplit kept = split.choose(mode);
  split.multiply(in, gradients);
  pass->hot_slots = static_cast<const int32_t*>(kept.slots.data_ptr());
  pass->hot = static_cast<const HotState*>(kept.state.data_ptr());
  return kept;
}

}  // namespace gemmascope_fast
