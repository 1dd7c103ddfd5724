#include "cpu/padded_rows.h"

#include <algorithm>
#include <cstring>

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
#elif defined(__aarch64__)
namespace neon {
extern const DotTable kDotTable;
}
#endif

const DotTable& dot_table(SimdTarget target) {
#if defined(__x86_64__)
  if (is_avx512(target)) return avx512::kDotTable;
  if (is_avx2(target)) return avx2::kDotTable;
#elif defined(__aarch64__)
  if (target == SimdTarget::kNeon) return neon::kDotTable;
#endif
  (void)target;
  return generic::kDotTable;
}

namespace {

constexpr int64_t kLanes = 16;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
    : m_(m),
      padded_(divide_up(m.cols, kLanes) * kLanes),
      unit_(m.col_stride == 1 || m.cols <= 1),
      table_(dot_table(simd_target())) {
  in_place_ = m.dtype == Dtype::kFloat32 && whole();
  transposed_ = !unit_ && (m.row_stride == 1 || m.rows <= 1);
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
    if (unit_) {
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

Stretch PaddedRows::stretch(int64_t begin, int64_t count) const {
  if (m_.col_stride != 1 || m_.row_stride != m_.cols) return {nullptr, 0};
  return {static_cast<const char*>(m_.row(begin)), count * m_.cols * element_size(m_.dtype)};
}

void PaddedRows::prefetch(int64_t begin, int64_t count, int64_t share, int64_t shares) const {
  const Stretch all = stretch(begin, count);
  const int64_t lines = divide_up(all.bytes, 64), end = lines * (share + 1) / shares;
  for (int64_t line = lines * share / shares; line < end; ++line) {
    __builtin_prefetch(all.at + line * 64, 0, 2);
  }
}

void PaddedRows::lanes(int64_t begin, int64_t count, FloatBuffer& buffer, float* target) const {
  const int dtype = static_cast<int>(m_.dtype);
  if (count < kLanes) std::fill(target, target + m_.cols * kLanes, 0.0f);
  if (transposed_) {
    const int64_t size = element_size(m_.dtype);
    const char* source = static_cast<const char*>(m_.row(begin));
    for (int64_t k = 0; k < m_.cols; ++k) {
      __builtin_prefetch(source + (k + 8) * m_.col_stride * size);
      table_.widen(source + k * m_.col_stride * size, dtype, count, target + k * kLanes);
    }
  } else if (unit_) {
    table_.transpose(m_.row(begin), m_.row_stride, dtype, count, m_.cols, target, kLanes);
  } else {
    float* rows = buffer.reserve(count * padded_);
    convert(begin, count, rows);
    table_.transpose(rows, padded_, 0, count, m_.cols, target, kLanes);
  }
}

}  // namespace gemmascope_fast
