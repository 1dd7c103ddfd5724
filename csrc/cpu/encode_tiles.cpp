#include "cpu/encode_tiles.h"

#include <algorithm>
#include <cstdlib>
#include <limits>

#include "cpu/encode_report.h"
#include "cpu/parallel.h"

namespace gemmascope_fast {

namespace {

constexpr int64_t kLanes = 16;
// A block of w takes less than half of a 512 KiB L2: the rest is for x, the lanes' state and the
// next block's prefetch.
constexpr int64_t kBlockBytes = 192 * 1024;
// A W_enc that each core's L2 holds whole.
constexpr int64_t kSmallBytes = 2 * kBlockBytes;
// Multiply-adds, 4 us at a core's peak, below which other threads are not woken for a few rows.
constexpr int64_t kSmallWork = 1 << 18;
// A row block of x stays in a shared L3. One that is read in parts need not: the fewer there are, the fewer times codes are read.
// Nor one for which codes are made: that costs more than reading all of x again.
constexpr int64_t kRowBlockBytes = 8 * 1024 * 1024;
constexpr int64_t kLargeBlockBytes = 4 * kRowBlockBytes;
constexpr int64_t kMaxRowBlock = 1024;
constexpr int64_t kMaxLargeBlock = 4096;
constexpr int64_t kMaxBlock = 256;
// Enough tasks per thread that the last ones even out.
constexpr int64_t kTasksPerSlot = 8;

// What stays in L2 of x while rows of W_enc pass by.
constexpr int64_t kHotFloats = 256 * 1024;

// Latents below which screening's set-up costs more than the product.
constexpr int64_t kScreenedLatents = 4 * kScreenBlock;
constexpr int64_t kScreenedWidth = 128;
// int32 holds q . p + 128 sum p up to here.
constexpr int64_t kWidestScreen = 65536;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Overrules what pays, not what is possible: "always" or "never" screened; "gathered" screens always, and gathers the candidates
// of many blocks even where x is small, for tests.
std::string wanted_mode() {
  const char* wanted = std::getenv("GEMMASCOPE_FAST_SCREEN");
  return wanted == nullptr ? "" : wanted;
}

// Why entries are not screened, or null.
const char* why_direct(const Matrix& x, const Matrix& w, bool packed) {
  const std::string mode = wanted_mode();
  if (mode == "never") return "GEMMASCOPE_FAST_SCREEN=never";
  if (x.cols == 0 || x.rows == 0 || w.rows == 0) return "empty";
  if (x.cols > kWidestScreen) return "d_in exceeds what int32 sums of int8 products hold";
  if (mode == "always" || mode == "gathered") return nullptr;
  if (!mode.empty()) {
    throw std::runtime_error("GEMMASCOPE_FAST_SCREEN=" + mode +
                             ": expected always, never or gathered");
  }
  if (!screens().fast) return "this processor, or the chosen target, has no int8 dot products";
  if (w.rows < kScreenedLatents || x.cols < kScreenedWidth) return "the dictionary is small";
  if (!packed && x.rows < screens().tokens) return "few rows and W_enc is not packed";
  return nullptr;
}

}  // namespace

void check_encode(const char* op, const Tensor& x, const Tensor& W_enc, const Tensor& b_enc) {
  check_dim(op, "x", x, 2);
  check_dim(op, "W_enc", W_enc, 2);
  check_float(op, "x", x);
  check_float(op, "W_enc", W_enc);
  check_dtype(op, "b_enc", b_enc, ScalarType::Float);
  if (W_enc.size(0) != x.size(1)) {
    fail(op, "W_enc must have shape [d_in=", x.size(1), ", d_sae], got ", shape_of(W_enc));
  }
  check_shape(op, "b_enc", b_enc, {W_enc.size(1)});
  if (W_enc.size(1) > std::numeric_limits<int32_t>::max()) {
    fail(op, "d_sae must be below 2^31 (indices are int32), got ", W_enc.size(1));
  }
}

EncodeTiles::EncodeTiles(const char* op, const Matrix& x, const Matrix& w,
                         const std::optional<PackedEncoder>& packed)
    : op_(op),
      table_(dot_table(simd_target())),
      x_rows_(x),
      w_rows_(w),
      n_(x.rows),
      d_sae_(w.rows),
      why_direct_(why_direct(x, w, packed.has_value())),
      packed_(packed) {
  if (screened() && packed_ && w_rows_.whole()) {
    hot_floats_ = wanted_mode() == "gathered" ? 1024 : screens().outruns_memory ? kHotFloats : 0;
  }
  partition();
  convert_x();
  if (why_direct_ != nullptr || tasks() == 0) return;
  if (packed_) {
    tokens_ = std::make_unique<ScreenedTokens>(x_, x_stride_, n_, x.cols, packed_->center());
    return;
  }
  center_ = choose_center(x_, x_stride_, n_, x.cols);
  const float* center = center_.empty() ? nullptr : center_.data();
  tokens_ = std::make_unique<ScreenedTokens>(x_, x_stride_, n_, x.cols, center);
}

EncodeTiles::~EncodeTiles() {
  EncodeReport report;
  report.op = op_;
  report.why_direct = why_direct_;
  report.layout = w_rows_.layout();
  report.packed = packed_.has_value();
  report.centered = tokens_ && tokens_->center() != nullptr;
  report.n = n_;
  report.d_in = x_rows_.cols();
  report.d_sae = d_sae_;
  for (const Scratch& scratch : scratch_) {
    report.screened_blocks += scratch.screened_blocks;
    report.direct_blocks += scratch.direct_blocks;
    report.candidates += scratch.candidate_count;
    report.rescored += scratch.rescored;
  }
  set_encode_report(report);
}

void EncodeTiles::partition() {
  const int64_t row_bytes = std::max<int64_t>(64, x_rows_.padded_cols() * 4);
  const bool makes_codes = why_direct_ == nullptr && !packed_;
  const int64_t most = hot_floats_ > 0 || makes_codes ? kLargeBlockBytes : kRowBlockBytes;
  const int64_t rows =
      std::clamp<int64_t>(most / row_bytes, 48, makes_codes ? kMaxLargeBlock : kMaxRowBlock);
  const int64_t unit = why_direct_ == nullptr ? kGroupRows : table_.tile_rows;
  row_blocks_ = divide_up(n_, rows);
  row_block_ = round_up(divide_up(n_, std::max<int64_t>(row_blocks_, 1)), unit);
  row_blocks_ = row_block_ == 0 ? 0 : divide_up(n_, row_block_);
  // At least 16: fewer would read x from L3 too often, and split the cache lines of a transposed
  // W_enc.
  block_ = std::clamp<int64_t>(kBlockBytes / row_bytes, kLanes, kMaxBlock) / kLanes * kLanes;
  // Used once, it need not stay in L2: longer stretches of each page are worth more.
  if (w_rows_.transposed() && n_ <= table_.tile_rows) block_ = kMaxBlock;
  if (why_direct_ == nullptr) block_ = kScreenBlock;
  const int64_t wanted = torch::stable::get_num_threads() * kTasksPerSlot;
  const int64_t ranges = divide_up(wanted, std::max<int64_t>(row_blocks_, 1));
  range_ = std::min(round_up(divide_up(d_sae_, ranges), block_), kMaxSide / block_ * block_);
  ranges_ = range_ == 0 ? 0 : divide_up(d_sae_, range_);
  // Tasks of few rows then read it again at no cost.
  const bool small = why_direct_ != nullptr && d_sae_ * row_bytes <= kSmallBytes;
  const bool worth = n_ * d_sae_ >= kSmallWork / std::max<int64_t>(x_rows_.padded_cols(), 1);
  if (small && worth && tasks() > 0 && tasks() < wanted) {
    row_block_ = round_up(divide_up(n_, divide_up(wanted, ranges_)), unit);
    row_blocks_ = divide_up(n_, row_block_);
  }
  slots_ = parallel_slots(tasks());
  scratch_.resize(static_cast<size_t>(slots_));
  for (Scratch& scratch : scratch_) {
    scratch.position.resize(static_cast<size_t>(block_ + 16));
    scratch.pre.resize(scratch.position.size());
  }
}

void EncodeTiles::convert_x() {
  x_ = x_rows_.rows(0, 0, x_buffer_, &x_stride_);
  if (x_rows_.in_place() || tasks() == 0) return;
  float* target = x_buffer_.reserve(n_ * x_stride_);
  x_ = target;
  parallel_ranges(n_, 64, [&](int64_t begin, int64_t end) {
    x_rows_.convert(begin, end - begin, target + begin * x_stride_);
  });
}

EncodeTiles::Task EncodeTiles::task(int64_t index) const {
  const int64_t row = index / ranges_ * row_block_, latent = index % ranges_ * range_;
  return {row, std::min(n_, row + row_block_), latent, std::min(d_sae_, latent + range_)};
}

void EncodeTiles::run(const Task& task, int64_t slot, const EncodeLimits& limits,
                      const Visit& visit) {
  Scratch& scratch = scratch_[static_cast<size_t>(slot)];
  if (why_direct_ == nullptr) return run_screened(task, scratch, limits, visit);
  run_direct(task, task.latent_begin, task.latent_end, scratch, limits, visit);
}

void EncodeTiles::run_direct(const Task& task, int64_t begin, int64_t end, Scratch& scratch,
                             const EncodeLimits& limits, const Visit& visit) {
  const int64_t step = table_.tile_rows, d = x_rows_.padded_cols();
  float* dots = scratch.dots.reserve(step * block_);
  float* state = scratch.state.reserve(step * block_ * kLanes);
  int32_t* position = scratch.position.data();
  const int64_t panels = divide_up(task.rows(), step);
  for (int64_t j = begin; j < end; j += block_) {
    const int64_t count = std::min(block_, end - j);
    const int64_t next = std::min(block_, end - j - count);
    int64_t w_stride = 0;
    const float* w = w_rows_.rows(j, count, scratch.weights, &w_stride);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t row = task.row_begin + p * step;
      const int64_t rows = std::min(step, task.row_end - row);
      if (panels > 1 && next > 0) w_rows_.prefetch(j + count, next, p, panels);
      table_.panel(x_ + row * x_stride_, x_stride_, rows, w, w_stride, count, d, state, dots,
                   block_);
      for (int64_t r = 0; r < rows; ++r) {
        const float own = limits.latent == nullptr ? limits.row(row + r) : 0.0f;
        const float* limit = limits.latent == nullptr ? &own : limits.latent + j;
        const int64_t found =
            table_.above(dots + r * block_, limits.bias + j, limit, limits.latent != nullptr, count,
                         position, scratch.pre.data());
        if (found > 0) visit(row + r, j, found, position, scratch.pre.data());
      }
    }
    ++scratch.direct_blocks;
  }
}

}  // namespace gemmascope_fast
