// The canonical float32 dot product as a register tile, vectorised over k.
//
//   dot(x, w) = reduce(acc), acc[l] = fma over k = l, l + 16, ... in ascending order
//   (docs/design.md, Numerics)
//
// Algorithm: R rows x L latents keep their 16 lanes in registers; each w vector is used R times and
// each x vector L times. For long d the lanes rest in memory between blocks of k, so that the x
// rows stay in L1 while the w rows stream from L2; the order of the additions, hence every bit, is
// the same whatever R, L and the blocks are.
// Bound: the fma ports. AVX2 3 x 2: 6 fma to 5 loads of 32 bytes; AVX-512 6 x 4: 24 fma to 10 loads
// of 64 bytes; NEON 3 x 2: 6 fma to 5 loads of 16 bytes, four times per 16 lanes, in 24 accumulators.
#include "cpu/simd/dot.h"

#include "cpu/simd/f16x.h"
#include "cpu/simd/widen.h"

namespace gemmascope_fast {
namespace GSF_TARGET {

// Vec is what one register holds; a step of 16 lanes is kParts of them. Working part by part keeps
// the tile of AVX2 within its 16 registers.
#if defined(__AVX512F__)
using Vec = __m512;
constexpr int kParts = 1;
constexpr int kTileRows = 6;
static inline Vec load_vec(const float* p) { return _mm512_loadu_ps(p); }
static inline void store_vec(float* p, Vec v) { _mm512_storeu_ps(p, v); }
static inline Vec zero_vec() { return _mm512_setzero_ps(); }
static inline Vec fma_vec(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline F16x lanes(const Vec (&v)[1]) { return {v[0]}; }
constexpr int tile_latents(int rows) { return rows <= 2 ? 8 : 4; }
#elif defined(__AVX2__)
using Vec = __m256;
constexpr int kParts = 2;
constexpr int kTileRows = 3;
static inline Vec load_vec(const float* p) { return _mm256_loadu_ps(p); }
static inline void store_vec(float* p, Vec v) { _mm256_storeu_ps(p, v); }
static inline Vec zero_vec() { return _mm256_setzero_ps(); }
static inline Vec fma_vec(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline F16x lanes(const Vec (&v)[2]) { return {v[0], v[1]}; }
constexpr int tile_latents(int rows) { return rows == 1 ? 4 : rows == 2 ? 3 : 2; }
#elif defined(GSF_NEON)
using Vec = float32x4_t;
constexpr int kParts = 4;
constexpr int kTileRows = 3;
static inline Vec load_vec(const float* p) { return vld1q_f32(p); }
static inline void store_vec(float* p, Vec v) { vst1q_f32(p, v); }
static inline Vec zero_vec() { return vdupq_n_f32(0); }
static inline Vec fma_vec(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
static inline F16x lanes(const Vec (&v)[4]) { return {v[0], v[1], v[2], v[3]}; }
constexpr int tile_latents(int rows) { return rows == 1 ? 4 : rows == 2 ? 3 : 2; }
#else
using Vec = F16x;
constexpr int kParts = 1;
constexpr int kTileRows = 2;
static inline Vec load_vec(const float* p) { return load(p); }
static inline void store_vec(float* p, Vec v) { store(p, v); }
static inline Vec zero_vec() { return zero(); }
static inline Vec fma_vec(const Vec& a, const Vec& b, const Vec& c) { return fma(a, b, c); }
static inline F16x lanes(const Vec (&v)[1]) { return v[0]; }
constexpr int tile_latents(int) { return 2; }
#endif

// Keeps a loaded vector in its register. GCC otherwise folds the load into every fma that uses it,
// and at two loads per cycle 8 loads to 6 fma cap AVX2 at 75 % of peak (64 % measured, 3 x 2 tile).
// For NEON it gathers the loads of several parts, and accumulators leave their registers: the loads stay in order.
static inline void pin(Vec& v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__AVX2__)
  asm("" : "+x"(v));
#elif defined(GSF_NEON)
  (void)v;
  asm volatile("" : : : "memory");
#else
  (void)v;
#endif
}

constexpr int64_t kWidth = kLanes / kParts;
// Longest stretch of k that a tile takes in one go: the rows of one tile then fit a 32 KiB L1.
constexpr int64_t kMaxBlock = kTileRows > 3 ? 768 : 1152;

struct Panel {
  const float* x;
  int64_t x_stride;
  const float* w;
  int64_t w_stride;
  int64_t latents, d;
  float* state;
  float* out;
  int64_t out_stride;
};

// reduce() of four at once: the same tree, lane by lane, in half the instructions (short d is bound
// by them).
static inline void reduce4(F16x a, F16x b, F16x c, F16x d, float (&sum)[4]) {
#if defined(__AVX2__)
  const __m256 a8 = fold8(a), b8 = fold8(b), c8 = fold8(c), d8 = fold8(d);
  const __m256 ab4 =
      _mm256_add_ps(_mm256_permute2f128_ps(a8, b8, 0x20), _mm256_permute2f128_ps(a8, b8, 0x31));
  const __m256 cd4 =
      _mm256_add_ps(_mm256_permute2f128_ps(c8, d8, 0x20), _mm256_permute2f128_ps(c8, d8, 0x31));
  const __m256d ab = _mm256_castps_pd(ab4), cd = _mm256_castps_pd(cd4);
  const __m256 s2 = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)),
                                  _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)));
  float s1[8];
  _mm256_storeu_ps(s1, _mm256_add_ps(s2, _mm256_permute_ps(s2, 0xb1)));
  sum[0] = s1[0];
  sum[1] = s1[4];
  sum[2] = s1[2];
  sum[3] = s1[6];
#elif defined(GSF_NEON)
  const float64x2_t a4 = vreinterpretq_f64_f32(fold4(a)), b4 = vreinterpretq_f64_f32(fold4(b));
  const float64x2_t c4 = vreinterpretq_f64_f32(fold4(c)), d4 = vreinterpretq_f64_f32(fold4(d));
  const float32x4_t ab2 = vaddq_f32(vreinterpretq_f32_f64(vzip1q_f64(a4, b4)),
                                    vreinterpretq_f32_f64(vzip2q_f64(a4, b4)));
  const float32x4_t cd2 = vaddq_f32(vreinterpretq_f32_f64(vzip1q_f64(c4, d4)),
                                    vreinterpretq_f32_f64(vzip2q_f64(c4, d4)));
  vst1q_f32(sum, vpaddq_f32(ab2, cd2));
#else
  sum[0] = reduce(a);
  sum[1] = reduce(b);
  sum[2] = reduce(c);
  sum[3] = reduce(d);
#endif
}

// Rows [0, R) x latents [j, j + L), elements [k0, k1).
template <int R, int L>
static inline void tile(const Panel& p, int64_t j, int64_t k0, int64_t k1) {
  Vec acc[R][L][kParts];
  float* state = p.state + j * R * kLanes;
#pragma GCC unroll 64
  for (int i = 0; i < R * L * kParts; ++i) {
    Vec& a = acc[i / kParts / L][i / kParts % L][i % kParts];
    a = k0 == 0 ? zero_vec() : load_vec(state + i * kWidth);
  }
  const float* w = p.w + j * p.w_stride;
  for (int64_t k = k0; k < k1; k += kLanes) {
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
      Vec wv[L];
#pragma GCC unroll 8
      for (int l = 0; l < L; ++l) {
        wv[l] = load_vec(w + l * p.w_stride + k + part * kWidth);
        if (R > 1) pin(wv[l]);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        Vec xv = load_vec(p.x + r * p.x_stride + k + part * kWidth);
        if (L > 1) pin(xv);
#pragma GCC unroll 8
        for (int l = 0; l < L; ++l) acc[r][l][part] = fma_vec(xv, wv[l], acc[r][l][part]);
      }
    }
  }
  if (k1 < p.d) {
#pragma GCC unroll 64
    for (int i = 0; i < R * L * kParts; ++i) {
      store_vec(state + i * kWidth, acc[i / kParts / L][i / kParts % L][i % kParts]);
    }
    return;
  }
  constexpr int kCount = R * L;
#pragma GCC unroll 16
  for (int i = 0; i < kCount; i += 4) {
    F16x four[4];
#pragma GCC unroll 4
    for (int e = 0; e < 4; ++e) {
      const int from = i + e < kCount ? i + e : i;
      four[e] = lanes(acc[from / L][from % L]);
    }
    float sum[4];
    reduce4(four[0], four[1], four[2], four[3], sum);
#pragma GCC unroll 4
    for (int e = 0; e < 4; ++e) {
      const int at = i + e;
      if (at < kCount) p.out[(at / L) * p.out_stride + j + at % L] = sum[e];
    }
  }
}

template <int R>
static void panel_rows(const Panel& p) {
  constexpr int kL = tile_latents(R);
  const int64_t blocks = p.d <= kMaxBlock ? 1 : (p.d + kMaxBlock - 1) / kMaxBlock;
  const int64_t block = ((p.d / kLanes + blocks - 1) / blocks) * kLanes;
  int64_t k0 = 0;
  do {
    const int64_t k1 = k0 + block < p.d ? k0 + block : p.d;
    int64_t j = 0;
    for (; j + kL <= p.latents; j += kL) tile<R, kL>(p, j, k0, k1);
    for (; j < p.latents; ++j) tile<R, 1>(p, j, k0, k1);
    k0 = k1;
  } while (k0 < p.d);
}

static void panel(const float* x, int64_t x_stride, int64_t rows, const float* w, int64_t w_stride,
                  int64_t latents, int64_t d, float* state, float* out, int64_t out_stride) {
  const Panel p = {x, x_stride, w, w_stride, latents, d, state, out, out_stride};
  switch (rows) {
    case 1:
      return panel_rows<1>(p);
    case 2:
      return panel_rows<2>(p);
#if defined(__AVX2__) || defined(GSF_NEON)
    case 3:
      return panel_rows<3>(p);
#endif
#if defined(__AVX512F__)
    case 4:
      return panel_rows<4>(p);
    case 5:
      return panel_rows<5>(p);
    case 6:
      return panel_rows<6>(p);
#endif
  }
}

struct DotPairs {
  const float* const* x;
  const void* const* w;
  int64_t d;
  float* state;
  float* out;
};

// One dot is a chain of fma, each waiting for the one before: several go side by side, elements [k0, k1). Those at `next` are
// read meanwhile.
template <int kPairs, int kDtype>
static inline void pair_dots(const DotPairs& p, int64_t first, int64_t next, int64_t k0,
                             int64_t k1) {
  constexpr int64_t kSize = kDtype == 0 ? 4 : 2;
  const float *xs[kPairs], *xn[kPairs];
  const void* ws[kPairs];
  const char* wn[kPairs];
  F16x acc[kPairs];
  float* state = p.state + first * kLanes;
#pragma GCC unroll 4
  for (int i = 0; i < kPairs; ++i) {
    xs[i] = p.x[first + i];
    ws[i] = p.w[first + i];
    xn[i] = p.x[next + i];
    wn[i] = static_cast<const char*>(p.w[next + i]);
    acc[i] = k0 == 0 ? zero() : load(state + i * kLanes);
  }
  for (int64_t k = k0; k < k1; k += kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i) {
      __builtin_prefetch(xn[i] + k, 0, 2);
      __builtin_prefetch(wn[i] + k * kSize, 0, 2);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i) {
      acc[i] = fma(load(xs[i] + k), load_as(ws[i], kDtype, k), acc[i]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kPairs; ++i) {
    if (k1 < p.d) {
      store(state + i * kLanes, acc[i]);
    } else {
      p.out[first + i] = reduce(acc[i]);
    }
  }
}

template <int kDtype>
static void pairs_of(const DotPairs& p, int64_t count, int64_t block) {
  constexpr int kPairs = 4;
  int64_t k0 = 0;
  do {
    const int64_t k1 = k0 + block < p.d ? k0 + block : p.d;
    int64_t i = 0;
    for (; i + kPairs <= count; i += kPairs) {
      pair_dots<kPairs, kDtype>(p, i, i + 2 * kPairs <= count ? i + kPairs : i, k0, k1);
    }
    for (; i < count; ++i) pair_dots<1, kDtype>(p, i, i, k0, k1);
    k0 = k1;
  } while (k0 < p.d);
}

static void pairs(const float* const* x, const void* const* w, int dtype, int64_t count, int64_t d,
                  int64_t block, float* state, float* out) {
  const DotPairs p = {x, w, d, state, out};
  if (dtype == 0) return pairs_of<0>(p, count, block);
  if (dtype == 1) return pairs_of<1>(p, count, block);
  pairs_of<2>(p, count, block);
}

static int64_t above(const float* dots, const float* bias, const float* limit, int64_t limit_stride,
                     int64_t count, int32_t* position, float* pre) {
  int64_t found = 0, j = 0;
#if defined(__AVX2__)
  const __m256 same = _mm256_set1_ps(limit_stride == 0 ? *limit : 0.0f);
  for (; j + 8 <= count; j += 8) {
    const __m256 p = _mm256_add_ps(_mm256_loadu_ps(dots + j), _mm256_loadu_ps(bias + j));
    const __m256 bound = limit_stride == 0 ? same : _mm256_loadu_ps(limit + j);
    unsigned mask = static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(p, bound, _CMP_NLE_UQ)));
    if (mask == 0) continue;
    float values[8];
    _mm256_storeu_ps(values, p);
    for (; mask != 0; mask &= mask - 1) {
      const int lane = __builtin_ctz(mask);
      position[found] = static_cast<int32_t>(j + lane);
      pre[found++] = values[lane];
    }
  }
#elif defined(GSF_NEON)
  const float32x4_t same = vdupq_n_f32(limit_stride == 0 ? *limit : 0.0f);
  for (; j + 8 <= count; j += 8) {
    const float32x4_t p0 = vaddq_f32(vld1q_f32(dots + j), vld1q_f32(bias + j));
    const float32x4_t p1 = vaddq_f32(vld1q_f32(dots + j + 4), vld1q_f32(bias + j + 4));
    const float32x4_t bound0 = limit_stride == 0 ? same : vld1q_f32(limit + j);
    const float32x4_t bound1 = limit_stride == 0 ? same : vld1q_f32(limit + j + 4);
    const uint32x4_t below0 = vcleq_f32(p0, bound0), below1 = vcleq_f32(p1, bound1);
    // A byte per lane, 0xff where it stays below.
    const uint16x8_t below = vcombine_u16(vmovn_u32(below0), vmovn_u32(below1));
    uint64_t mask = ~vget_lane_u64(vreinterpret_u64_u8(vmovn_u16(below)), 0);
    if (mask == 0) continue;
    float values[8];
    vst1q_f32(values, p0);
    vst1q_f32(values + 4, p1);
    while (mask != 0) {
      const int lane = __builtin_ctzll(mask) / 8;
      mask &= ~(uint64_t{0xff} << (lane * 8));
      position[found] = static_cast<int32_t>(j + lane);
      pre[found++] = values[lane];
    }
  }
#endif
  for (; j < count; ++j) {
    const float p = dots[j] + bias[j];
    position[found] = static_cast<int32_t>(j);
    pre[found] = p;
    found += !(p <= limit[j * limit_stride]);
  }
  return found;
}

extern const DotTable kDotTable;
const DotTable kDotTable = {kTileRows, panel, pairs, above, widen, transpose};

}  // namespace GSF_TARGET
}  // namespace gemmascope_fast
