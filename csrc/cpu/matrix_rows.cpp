#include "cpu/matrix_rows.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <type_traits>

#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace gemmascope_fast {
namespace {

constexpr int64_t kChunk = 64;

// Strided elements go through a short contiguous buffer, so that dtypes are converted in one place.
template <typename T>
void pack(const T* src, int64_t stride, int64_t count, T* dst) {
  for (int64_t i = 0; i < count; ++i) dst[i] = src[i * stride];
}

template <typename T>
void unpack(const T* src, int64_t stride, int64_t count, T* dst) {
  for (int64_t i = 0; i < count; ++i) dst[i * stride] = src[i];
}

// One column k of `count` <= kRowBlock rows.
template <typename T>
void load_column(const Matrix& m, const T* src, int64_t count, float* dst, int64_t ld) {
  if constexpr (std::is_same_v<T, float>) {
    for (int64_t i = 0; i < count; ++i) dst[i * ld] = src[i * m.row_stride];
    return;
  }
  T packed[kRowBlock];
  float floats[kRowBlock];
  pack(src, m.row_stride, count, packed);
  rows_table().widen(static_cast<int>(m.dtype), packed, count, floats);
  unpack(floats, ld, count, dst);
}

template <typename T>
void store_column(const Matrix& m, T* dst, int64_t count, const float* src, int64_t ld) {
  if constexpr (std::is_same_v<T, float>) {
    for (int64_t i = 0; i < count; ++i) dst[i * m.row_stride] = src[i * ld];
    return;
  }
  T packed[kRowBlock];
  float floats[kRowBlock];
  pack(src, ld, count, floats);
  rows_table().narrow(static_cast<int>(m.dtype), floats, count, packed);
  unpack(packed, m.row_stride, count, dst);
}

template <typename T>
void load_strided(const Matrix& m, int64_t begin, int64_t count, float* dst, int64_t ld) {
  if (count == 1) {
    T packed[kChunk];
    const T* row = static_cast<const T*>(m.row(begin));
    for (int64_t k = 0; k < m.cols; k += kChunk) {
      const int64_t size = std::min(kChunk, m.cols - k);
      pack(row + k * m.col_stride, m.col_stride, size, packed);
      rows_table().widen(static_cast<int>(m.dtype), packed, size, dst + k);
    }
    return;
  }
  for (int64_t r = 0; r < count; r += kRowBlock) {
    const T* row = static_cast<const T*>(m.row(begin + r));
    const int64_t size = std::min(kRowBlock, count - r);
    for (int64_t k = 0; k < m.cols; ++k) {
      load_column(m, row + k * m.col_stride, size, dst + r * ld + k, ld);
    }
  }
}

template <typename T>
void store_strided(const Matrix& m, int64_t begin, int64_t count, const float* src, int64_t ld) {
  if (count == 1) {
    T packed[kChunk];
    T* row = static_cast<T*>(const_cast<void*>(m.row(begin)));
    for (int64_t k = 0; k < m.cols; k += kChunk) {
      const int64_t size = std::min(kChunk, m.cols - k);
      rows_table().narrow(static_cast<int>(m.dtype), src + k, size, packed);
      unpack(packed, m.col_stride, size, row + k * m.col_stride);
    }
    return;
  }
  for (int64_t r = 0; r < count; r += kRowBlock) {
    T* row = static_cast<T*>(const_cast<void*>(m.row(begin + r)));
    const int64_t size = std::min(kRowBlock, count - r);
    for (int64_t k = 0; k < m.cols; ++k) {
      store_column(m, row + k * m.col_stride, size, src + r * ld + k, ld);
    }
  }
}

FloatRows copy_rows(const Tensor& owner, const Matrix& m) {
  FloatRows rows;
  rows.keep = new_tensor(owner, {m.rows, m.cols}, ScalarType::Float);
  float* data = static_cast<float*>(rows.keep.data_ptr());
  rows.data = data;
  rows.cols = rows.stride = m.cols;
  parallel_ranges(m.rows, kRowBlock, [&](int64_t begin, int64_t end) {
    load_rows(m, begin, end - begin, data + begin * m.cols, m.cols);
  });
  return rows;
}

}  // namespace

void load_rows(const Matrix& m, int64_t begin, int64_t count, float* dst, int64_t ld) {
  if (m.cols == 0) return;
  if (unit_columns(m)) {
    for (int64_t r = 0; r < count; ++r) {
      rows_table().widen(static_cast<int>(m.dtype), m.row(begin + r), m.cols, dst + r * ld);
    }
  } else if (m.dtype == Dtype::kFloat32) {
    load_strided<float>(m, begin, count, dst, ld);
  } else {
    load_strided<uint16_t>(m, begin, count, dst, ld);
  }
}

void store_rows(const Matrix& m, int64_t begin, int64_t count, const float* src, int64_t ld) {
  if (m.cols == 0) return;
  if (unit_columns(m)) {
    for (int64_t r = 0; r < count; ++r) {
      void* row = const_cast<void*>(m.row(begin + r));
      rows_table().narrow(static_cast<int>(m.dtype), src + r * ld, m.cols, row);
    }
  } else if (m.dtype == Dtype::kFloat32) {
    store_strided<float>(m, begin, count, src, ld);
  } else {
    store_strided<uint16_t>(m, begin, count, src, ld);
  }
}

FloatRows float_rows(const Tensor& owner, const Matrix& m) {
  if (direct_rows(m)) return {owner, static_cast<const float*>(m.data), m.cols, m.row_stride};
  return copy_rows(owner, m);
}

Matrix gatherable(const Tensor& owner, const Matrix& m, Tensor* keep) {
  if (unit_columns(m)) return m;
  const FloatRows rows = copy_rows(owner, m);
  *keep = rows.keep;
  return {rows.data, Dtype::kFloat32, m.rows, m.cols, m.cols, 1};
}

namespace {

bool dense_2d(const Tensor& t) {
  if (t.dim() != 2 || t.size(0) < 2 || t.size(1) < 2) return false;
  return (t.stride(1) == 1 && t.stride(0) == t.size(1)) ||
         (t.stride(0) == 1 && t.stride(1) == t.size(0));
}

// calloc maps fresh pages for a block of this size, or clears a recycled one with one thread. Above 32 MiB glibc maps unless
// told otherwise, and a page fault is due only where a row is written.
constexpr int64_t kZeroPageBytes = int64_t{4} << 20;
constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
// A fault costs about 3 us for 4 KiB and 200 us for 2 MiB (512 of those): huge pages win from an eighth upward.
constexpr double kHugeFraction = 1.0 / 8;

}  // namespace

Gradient gradient_like(const Tensor& parameter, const Matrix& latents, double touched) {
  const int64_t bytes = parameter.numel() * static_cast<int64_t>(parameter.element_size());
  if (bytes <= kZeroPageBytes || !dense_2d(parameter)) {
    return {tensor_like(parameter), false};
  }
  const bool many = touched > kHugeFraction, zeroed = !many || !unit_columns(latents);
  const size_t size = static_cast<size_t>(bytes) + kHugePage;
  void* block = zeroed ? std::calloc(size, 1) : std::malloc(size);
  if (block == nullptr) return {tensor_like(parameter), false};
  const auto address = reinterpret_cast<uintptr_t>(block);
  void* data = reinterpret_cast<void*>((address + kHugePage - 1) / kHugePage * kHugePage);
#ifdef MADV_HUGEPAGE
  if (many || !unit_columns(latents)) madvise(data, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#endif
  return {torch::stable::from_blob(data, parameter.sizes(), parameter.strides(), parameter.device(),
                                   parameter.scalar_type(), [block](void*) { std::free(block); }),
          zeroed};
}

void sum_rows(const FloatRows& m, int64_t rows, float* out) {
  std::fill_n(out, m.cols, 0.0f);
  const float ones[kRowGroup] = {1, 1, 1, 1};
  parallel_ranges(m.cols, 256, [&](int64_t begin, int64_t end) {
    for (int64_t r = 0; r < rows; r += kRowGroup) {
      const int count = static_cast<int>(std::min<int64_t>(kRowGroup, rows - r));
      const float* group[kRowGroup];
      for (int i = 0; i < count; ++i) group[i] = m.row(r + i) + begin;
      rows_table().axpy(group, ones, count, false, end - begin, {nullptr, 0}, out + begin);
    }
  });
}

Tensor empty_vector(const Tensor& like, ScalarType dtype, int64_t size) {
  return new_tensor(like, {size}, dtype);
}

}  // namespace gemmascope_fast
