// Row micro-kernels, compiled once per SIMD target: see row.h.
//
// What bounds them: gather and gather_dot by DRAM (one fma per 4 or 2 bytes read), axpy and dot_axpy by L1/L2. Groups of
// four rows share one load and store of the accumulator and give four independent dot chains (an fma takes four cycles).
#include "cpu/simd/row.h"

#include "cpu/simd/f16x.h"
#include "cpu/simd/narrow.h"
#include "cpu/simd/stream.h"

namespace gemmascope_fast {
namespace GSF_TARGET {

static inline F16x load_tail(const float* p, int64_t count) {
  float lanes[kLanes] = {};
  memcpy(lanes, p, static_cast<size_t>(count) * sizeof(float));
  return load(lanes);
}
static inline void store_tail(float* p, F16x a, int64_t count) {
  float lanes[kLanes];
  store(lanes, a);
  memcpy(p, lanes, static_cast<size_t>(count) * sizeof(float));
}

struct Float32 {
  using Element = float;
  static F16x at(const float* p) { return load(p); }
};
struct BFloat16 {
  using Element = uint16_t;
  static F16x at(const uint16_t* p) { return load_bf16(p); }
};
struct Float16 {
  using Element = uint16_t;
  static F16x at(const uint16_t* p) { return load_fp16(p); }
};

template <typename Type>
static inline F16x at_tail(const typename Type::Element* p, int64_t count) {
  typename Type::Element lanes[kLanes] = {};
  memcpy(lanes, p, static_cast<size_t>(count) * sizeof(lanes[0]));
  return Type::at(lanes);
}

// Rows are prefetched two groups ahead, into L2: 24 GB/s of random rows of 4.6 KB on two Zen 4 cores, 22 into L1, whose
// miss buffers are half as many; a plain stream gives 29.
constexpr int kAhead = 2 * kRowGroup;

// The rows of one group of entries, and the addresses to prefetch while it is read.
template <typename Type>
struct Group {
  const typename Type::Element* row[kRowGroup];
  const char* ahead[kRowGroup];
};

template <typename Type>
static inline Group<Type> group_at(RowSource source, const int32_t* indices, int64_t e, int size,
                                   int64_t readable) {
  const char* base = static_cast<const char*>(source.data);
  Group<Type> group;
  for (int r = 0; r < size; ++r) {
    group.row[r] =
        reinterpret_cast<const typename Type::Element*>(base + indices[e + r] * source.row_bytes);
    const int64_t next = e + r + kAhead < readable ? e + r + kAhead : e + r;
    group.ahead[r] = base + indices[next] * source.row_bytes;
  }
  return group;
}

template <typename Type, int R>
static inline void prefetch(const Group<Type>& group, int64_t k) {
  const int64_t byte = k * static_cast<int64_t>(sizeof(typename Type::Element));
  if (byte % 64 != 0) return;  // one per cache line: 16 elements of two bytes are half of one
  for (int r = 0; r < R; ++r) __builtin_prefetch(group.ahead[r] + byte, 0, 2);
}

template <typename Type, int R>
static void gather_group(const Group<Type>& group, const float* coef, int64_t d, float* acc) {
  F16x c[R];
  for (int r = 0; r < R; ++r) c[r] = broadcast(coef[r]);
  int64_t k = 0;
  for (; k + kLanes <= d; k += kLanes) {
    prefetch<Type, R>(group, k);
    F16x a = load(acc + k);
    for (int r = 0; r < R; ++r) a = fma(c[r], Type::at(group.row[r] + k), a);
    store(acc + k, a);
  }
  if (k == d) return;
  F16x a = load_tail(acc + k, d - k);
  for (int r = 0; r < R; ++r) a = fma(c[r], at_tail<Type>(group.row[r] + k, d - k), a);
  store_tail(acc + k, a, d - k);
}

template <typename Type>
static void gather_rows(RowSource source, const int32_t* indices, const float* coef, int64_t count,
                        int64_t readable, int64_t d, float* acc) {
  int64_t e = 0;
  for (; e + kRowGroup <= count; e += kRowGroup) {
    gather_group<Type, kRowGroup>(group_at<Type>(source, indices, e, kRowGroup, readable), coef + e,
                                  d, acc);
  }
  switch (count - e) {
    case 1:
      return gather_group<Type, 1>(group_at<Type>(source, indices, e, 1, readable), coef + e, d,
                                   acc);
    case 2:
      return gather_group<Type, 2>(group_at<Type>(source, indices, e, 2, readable), coef + e, d,
                                   acc);
    case 3:
      return gather_group<Type, 3>(group_at<Type>(source, indices, e, 3, readable), coef + e, d,
                                   acc);
  }
}

static void gather(RowSource source, const int32_t* indices, const float* coef, int64_t count,
                   int64_t readable, int64_t d, float* acc) {
  switch (source.dtype) {
    case 1:
      return gather_rows<BFloat16>(source, indices, coef, count, readable, d, acc);
    case 2:
      return gather_rows<Float16>(source, indices, coef, count, readable, d, acc);
    default:
      return gather_rows<Float32>(source, indices, coef, count, readable, d, acc);
  }
}

// Sums that a loop addresses by number, if only in the tail, live in memory: the tails are unrolled for the loops before them.
template <typename Type, int R>
static void dot_group(const Group<Type>& group, int64_t d, const float* g, float* out) {
  F16x sum[R];
  for (int r = 0; r < R; ++r) sum[r] = zero();
  int64_t k = 0;
  for (; k + kLanes <= d; k += kLanes) {
    prefetch<Type, R>(group, k);
    const F16x b = load(g + k);
    for (int r = 0; r < R; ++r) sum[r] = fma(Type::at(group.row[r] + k), b, sum[r]);
  }
  if (k < d) {
    const F16x b = load_tail(g + k, d - k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum[r] = fma(at_tail<Type>(group.row[r] + k, d - k), b, sum[r]);
  }
  for (int r = 0; r < R; ++r) out[r] = reduce(sum[r]);
}

template <typename Type>
static void dot_rows(RowSource source, const int32_t* indices, int64_t count, int64_t readable,
                     int64_t d, const float* g, float* out) {
  int64_t e = 0;
  for (; e + kRowGroup <= count; e += kRowGroup) {
    dot_group<Type, kRowGroup>(group_at<Type>(source, indices, e, kRowGroup, readable), d, g,
                               out + e);
  }
  for (; e < count; ++e) {
    dot_group<Type, 1>(group_at<Type>(source, indices, e, 1, readable), d, g, out + e);
  }
}

static void gather_dot(RowSource source, const int32_t* indices, int64_t count, int64_t readable,
                       int64_t d, const float* g, float* out) {
  switch (source.dtype) {
    case 1:
      return dot_rows<BFloat16>(source, indices, count, readable, d, g, out);
    case 2:
      return dot_rows<Float16>(source, indices, count, readable, d, g, out);
    default:
      return dot_rows<Float32>(source, indices, count, readable, d, g, out);
  }
}

template <int R, bool kDot>
static void sweep(const float* const* rows, const float* coef, bool first, int64_t d,
                  const float* w, RowAhead ahead, float* acc, float* dots) {
  F16x sum[R];
  for (int r = 0; r < R; ++r) sum[r] = zero();
  const char* next = static_cast<const char*>(ahead.data);
  int64_t k = 0;
  for (; k + kLanes <= d; k += kLanes) {
    if (next != nullptr) __builtin_prefetch(next + k * ahead.element_size, 0, 2);
    F16x a = first ? zero() : load(acc + k);
    const F16x b = kDot ? load(w + k) : zero();
    for (int r = 0; r < R; ++r) {
      const F16x x = load(rows[r] + k);
      if (kDot) sum[r] = fma(b, x, sum[r]);
      a = fma(broadcast(coef[r]), x, a);
    }
    store(acc + k, a);
  }
  if (k < d) {
    F16x a = first ? zero() : load_tail(acc + k, d - k);
    const F16x b = kDot ? load_tail(w + k, d - k) : zero();
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const F16x x = load_tail(rows[r] + k, d - k);
      if (kDot) sum[r] = fma(b, x, sum[r]);
      a = fma(broadcast(coef[r]), x, a);
    }
    store_tail(acc + k, a, d - k);
  }
  if (kDot) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) dots[r] = reduce(sum[r]);
  }
}

template <bool kDot>
static void sweep_count(const float* const* rows, const float* coef, int count, bool first,
                        int64_t d, const float* w, RowAhead ahead, float* acc, float* dots) {
  switch (count) {
    case 1:
      return sweep<1, kDot>(rows, coef, first, d, w, ahead, acc, dots);
    case 2:
      return sweep<2, kDot>(rows, coef, first, d, w, ahead, acc, dots);
    case 3:
      return sweep<3, kDot>(rows, coef, first, d, w, ahead, acc, dots);
    default:
      return sweep<4, kDot>(rows, coef, first, d, w, ahead, acc, dots);
  }
}

static void axpy(const float* const* rows, const float* coef, int count, bool first, int64_t d,
                 RowAhead ahead, float* acc) {
  sweep_count<false>(rows, coef, count, first, d, nullptr, ahead, acc, nullptr);
}

static void dot_axpy(const float* const* rows, const float* coef, int count, bool first, int64_t d,
                     const float* w, RowAhead ahead, float* acc, float* dots) {
  sweep_count<true>(rows, coef, count, first, d, w, ahead, acc, dots);
}

template <typename Type>
static void widen_row(const void* src, int64_t d, float* dst) {
  const auto* p = static_cast<const typename Type::Element*>(src);
  int64_t k = 0;
  for (; k + kLanes <= d; k += kLanes) store(dst + k, Type::at(p + k));
  if (k < d) store_tail(dst + k, at_tail<Type>(p + k, d - k), d - k);
}

static void widen(int dtype, const void* src, int64_t d, float* dst) {
  switch (dtype) {
    case 1:
      return widen_row<BFloat16>(src, d, dst);
    case 2:
      return widen_row<Float16>(src, d, dst);
    default:
      memcpy(dst, src, static_cast<size_t>(d) * sizeof(float));
  }
}

static void narrow(int dtype, const float* src, int64_t d, void* dst) {
  uint16_t* p = static_cast<uint16_t*>(dst);
  if (dtype == 0) {
    memcpy(dst, src, static_cast<size_t>(d) * sizeof(float));
  } else if (dtype == 1) {
    for (int64_t k = 0; k < d; ++k) p[k] = to_bf16(src[k]);
  } else {
    for (int64_t k = 0; k < d; ++k) p[k] = to_fp16(src[k]);
  }
}

extern const RowTable kRowTable;
const RowTable kRowTable = {widen, narrow,   gather, gather_dot,
                            axpy,  dot_axpy, stream, stream_fence};

}  // namespace GSF_TARGET

// The selection is compiled once, with the generic variant.
#define GSF_IS_generic 1
#define GSF_JOIN_(a, b) a##b
#define GSF_JOIN(a, b) GSF_JOIN_(a, b)
#if GSF_JOIN(GSF_IS_, GSF_TARGET)

#if defined(__x86_64__)
namespace avx2 {
extern const RowTable kRowTable;
}
namespace avx512 {
extern const RowTable kRowTable;
}
#elif defined(__aarch64__)
namespace neon {
extern const RowTable kRowTable;
}
#endif

const RowTable& row_table(SimdTarget target) {
#if defined(__x86_64__)
  if (is_avx512(target)) return avx512::kRowTable;
  if (is_avx2(target)) return avx2::kRowTable;
#elif defined(__aarch64__)
  if (target == SimdTarget::kNeon) return neon::kRowTable;
#endif
  (void)target;
  return generic::kRowTable;
}

#endif

}  // namespace gemmascope_fast
