#include "cpu/encode_tiles.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/parallel.h"

namespace gemmascope_fast {

namespace generic {
extern const DotTable kDotTable;
}
#if defined(__x86_64__)
namespace avx2 {
extern const DotTable kDotTable;
}
namespace avx512 {
extern const DotTable kDotTable;
}
#endif

const DotTable& dot_table(SimdTarget target) {
#if defined(__x86_64__)
  if (target == SimdTarget::kAvx512) return avx512::kDotTable;
  if (target == SimdTarget::kAvx2) return avx2::kDotTable;
#endif
  (void)target;
  return generic::kDotTable;
}

namespace {

constexpr int64_t kLanes = 16;
// A block of w takes less than half of a 512 KiB L2: the rest is for x, the lanes' state and the
// next block's prefetch.
constexpr int64_t kBlockBytes = 192 * 1024;
// A row block of x stays in a shared L3.
constexpr int64_t kRowBlockBytes = 8 * 1024 * 1024;
constexpr int64_t kMaxRowBlock = 1024;
constexpr int64_t kMaxBlock = 256;
// Enough tasks per thread that the last ones even out.
constexpr int64_t kTasksPerSlot = 8;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Elements of any stride, gathered to where table.widen can read them.
template <typename T>
void widen_strided(const DotTable& table, const T* source, Dtype dtype, int64_t stride,
                   int64_t count, float* target) {
  T raw[64];
  for (int64_t i = 0; i < count; i += 64) {
    const int64_t part = std::min<int64_t>(64, count - i);
    for (int64_t e = 0; e < part; ++e) raw[e] = source[(i + e) * stride];
    table.widen(raw, static_cast<int>(dtype), part, target + i);
  }
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

FloatVector::FloatVector(const Tensor& t) : data_(static_cast<const float*>(t.data_ptr())) {
  const int64_t size = t.size(0), stride = t.stride(0);
  if (stride == 1 || size <= 1) return;
  copy_.resize(static_cast<size_t>(size));
  for (int64_t i = 0; i < size; ++i) copy_[static_cast<size_t>(i)] = data_[i * stride];
  data_ = copy_.data();
}

float* FloatBuffer::reserve(int64_t size) {
  if (size > size_ || aligned_ == nullptr) {
    storage_.reset(new float[static_cast<size_t>(size + kLanes)]);
    const auto address = reinterpret_cast<uintptr_t>(storage_.get());
    aligned_ = reinterpret_cast<float*>((address + 63) / 64 * 64);
    size_ = size;
  }
  return aligned_;
}

PaddedRows::PaddedRows(const Matrix& m)
    : m_(m), padded_(round_up(m.cols, kLanes)), table_(dot_table(simd_target())) {
  const bool unit = m.col_stride == 1 || m.cols <= 1;
  in_place_ = m.dtype == Dtype::kFloat32 && unit && padded_ == m.cols;
  transposed_ = !unit && (m.row_stride == 1 || m.rows <= 1);
}

const float* PaddedRows::rows(int64_t begin, int64_t count, FloatBuffer& buffer,
                              int64_t* stride) const {
  if (in_place_) {
    *stride = m_.row_stride;
    return static_cast<const float*>(m_.row(begin));
  }
  *stride = padded_;
  float* target = buffer.reserve(count * padded_);
  convert(begin, count, target);
  return target;
}

void PaddedRows::convert(int64_t begin, int64_t count, float* target) const {
  const int dtype = static_cast<int>(m_.dtype);
  if (transposed_) {
    table_.transpose(m_.row(begin), m_.col_stride, dtype, m_.cols, count, target, padded_);
  }
  for (int64_t r = 0; r < count; ++r) {
    float* row = target + r * padded_;
    const void* source = m_.row(begin + r);
    if (!transposed_ && (m_.col_stride == 1 || m_.cols <= 1)) {
      table_.widen(source, dtype, m_.cols, row);
    } else if (!transposed_ && m_.dtype == Dtype::kFloat32) {
      widen_strided(table_, static_cast<const float*>(source), m_.dtype, m_.col_stride, m_.cols,
                    row);
    } else if (!transposed_) {
      widen_strided(table_, static_cast<const uint16_t*>(source), m_.dtype, m_.col_stride, m_.cols,
                    row);
    }
    std::fill(row + m_.cols, row + padded_, 0.0f);
  }
}

void PaddedRows::prefetch(int64_t begin, int64_t count, int64_t share, int64_t shares) const {
  if (!in_place_ || m_.row_stride != m_.cols) return;
  const char* base = static_cast<const char*>(m_.row(begin));
  const int64_t lines = divide_up(count * m_.cols * 4, 64);
  const int64_t end = lines * (share + 1) / shares;
  for (int64_t line = lines * share / shares; line < end; ++line) {
    __builtin_prefetch(base + line * 64, 0, 2);
  }
}

EncodeTiles::EncodeTiles(const Matrix& x, const Matrix& w)
    : table_(dot_table(simd_target())), x_rows_(x), w_rows_(w), n_(x.rows), d_sae_(w.rows) {
  const int64_t row_bytes = std::max<int64_t>(64, x_rows_.padded_cols() * 4);
  const int64_t rows = std::clamp<int64_t>(kRowBlockBytes / row_bytes, 48, kMaxRowBlock);
  row_blocks_ = divide_up(n_, rows);
  row_block_ = round_up(divide_up(n_, std::max<int64_t>(row_blocks_, 1)), table_.tile_rows);
  row_blocks_ = row_block_ == 0 ? 0 : divide_up(n_, row_block_);
  // At least 16: fewer would read x from L3 too often, and split the cache lines of a transposed
  // W_enc.
  block_ = std::clamp<int64_t>(kBlockBytes / row_bytes, kLanes, kMaxBlock) / kLanes * kLanes;
  // Used once, it need not stay in L2: longer stretches of each page are worth more.
  if (w_rows_.transposed() && n_ <= table_.tile_rows) block_ = kMaxBlock;
  const int64_t wanted = torch::stable::get_num_threads() * kTasksPerSlot;
  const int64_t ranges = divide_up(wanted, std::max<int64_t>(row_blocks_, 1));
  range_ = std::min(round_up(divide_up(d_sae_, ranges), block_), kMaxSide / block_ * block_);
  ranges_ = range_ == 0 ? 0 : divide_up(d_sae_, range_);
  slots_ = parallel_slots(tasks());
  scratch_.resize(static_cast<size_t>(slots_));
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

void EncodeTiles::run(const Task& task, int64_t slot, const Visit& visit) {
  Scratch& scratch = scratch_[static_cast<size_t>(slot)];
  const int64_t step = table_.tile_rows, d = x_rows_.padded_cols();
  float* dots = scratch.dots.reserve(step * block_);
  float* state = scratch.state.reserve(step * block_ * kLanes);
  const int64_t panels = divide_up(task.rows(), step);
  for (int64_t j = task.latent_begin; j < task.latent_end; j += block_) {
    const int64_t count = std::min(block_, task.latent_end - j);
    const int64_t next = std::min(block_, task.latent_end - j - count);
    int64_t w_stride = 0;
    const float* w = w_rows_.rows(j, count, scratch.weights, &w_stride);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t row = task.row_begin + p * step;
      const int64_t rows = std::min(step, task.row_end - row);
      if (panels > 1 && next > 0) w_rows_.prefetch(j + count, next, p, panels);
      table_.panel(x_ + row * x_stride_, x_stride_, rows, w, w_stride, count, d, state, dots,
                   block_);
      for (int64_t r = 0; r < rows; ++r) visit(row + r, j, count, dots + r * block_);
    }
  }
}

}  // namespace gemmascope_fast
