// Adam's row micro-kernels, compiled once per SIMD target: see adam_row.h.
//
// What bounds them: update by DRAM (w and v read and written: 16 bytes per element, 8 of them also m), its square root and
// division being 1.5 cycles per element with AVX2; random by its 20 multiplications per four words.
//
// 8-bit second moments: value = 2^(e - 31) 2^(code / 8) (1 + code % 8 / 8), e the exponent of the block of 128, code 0
// is 0: the float's own bits less a base, cut to 8. Cut parts are rounded up with their probability, so the decay by 0.999,
// far below a code's step, is not lost.
// Source of the generator: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", Philox 4x32-7.
#include "cpu/simd/adam_row.h"

#include "cpu/simd/f16x.h"
#include "cpu/simd/narrow.h"

namespace gemmascope_fast {
namespace GSF_TARGET {

// Up to 16 elements; the rest is zero and stays unwritten.
static inline F16x load_part(const float* p, int64_t count) {
  if (count >= kLanes) return load(p);
  float lanes[kLanes] = {};
  memcpy(lanes, p, static_cast<size_t>(count) * sizeof(float));
  return load(lanes);
}
static inline void store_part(float* p, F16x a, int64_t count) {
  if (count >= kLanes) return store(p, a);
  float lanes[kLanes];
  store(lanes, a);
  memcpy(p, lanes, static_cast<size_t>(count) * sizeof(float));
}

static bool any_nonzero(const float* g, int64_t c) {
  for (int64_t k = 0; k < c; k += 256) {
    uint32_t seen = 0;
    const int64_t end = k + 256 < c ? k + 256 : c;
    for (int64_t i = k; i < end; ++i) {
      uint32_t bits;
      memcpy(&bits, g + i, 4);
      seen |= bits << 1;
    }
    if (seen != 0) return true;
  }
  return false;
}

static void dots(const float* g, const float* w, int64_t c, float* out) {
  F16x gw = zero(), ww = zero();
  for (int64_t k = 0; k < c; k += kLanes) {
    const F16x b = load_part(w + k, c - k);
    gw = fma(load_part(g + k, c - k), b, gw);
    ww = fma(b, b, ww);
  }
  out[0] = reduce(gw);
  out[1] = reduce(ww);
}

template <bool kMomentum, bool kParallel>
static void update_row(const AdamScalars& s, const float* g, float* m, float* v, float* w,
                       int64_t c, RowAhead ahead) {
  const F16x step_size = broadcast(s.step_size), decay1 = broadcast(s.decay1),
             one_minus1 = broadcast(s.one_minus1), decay2 = broadcast(s.decay2),
             one_minus2 = broadcast(s.one_minus2), scale = broadcast(s.scale),
             eps = broadcast(s.eps), parallel = broadcast(s.parallel);
  const char* next = static_cast<const char*>(ahead.data);
  for (int64_t k = 0; k < c; k += kLanes) {
    if (next != nullptr) __builtin_prefetch(next + k * ahead.element_size, 0, 2);
    const int64_t count = c - k;
    F16x a = g == nullptr ? zero() : load_part(g + k, count);
    const F16x weight = load_part(w + k, count);
    if (kParallel) a = sub(a, mul(parallel, weight));
    const F16x second = add(mul(load_part(v + k, count), decay2), mul(mul(one_minus2, a), a));
    F16x first = a;
    if (kMomentum) {
      first = add(mul(load_part(m + k, count), decay1), mul(one_minus1, a));
      store_part(m + k, first, count);
    }
    store_part(v + k, second, count);
    const F16x root = add(mul(sqrt(second), scale), eps);
    store_part(w + k, sub(weight, div(mul(step_size, first), root)), count);
  }
}

static void update(const AdamScalars& s, const float* g, float* m, float* v, float* w, int64_t c,
                   RowAhead ahead) {
  const bool parallel = s.parallel != 0.0f;  // NaN included
  if (m != nullptr) {
    return parallel ? update_row<true, true>(s, g, m, v, w, c, ahead)
                    : update_row<true, false>(s, g, m, v, w, c, ahead);
  }
  return parallel ? update_row<false, true>(s, g, m, v, w, c, ahead)
                  : update_row<false, false>(s, g, m, v, w, c, ahead);
}

static void divide(float divisor, float* w, int64_t c) {
  const F16x by = broadcast(divisor);
  for (int64_t k = 0; k < c; k += kLanes)
    store_part(w + k, div(load_part(w + k, c - k), by), c - k);
}

static void decode(const uint8_t* codes, const uint8_t* exponents, int64_t c, float* v) {
  for (int64_t begin = 0; begin < c; begin += kMomentBlock) {
    const int64_t end = begin + kMomentBlock < c ? begin + kMomentBlock : c;
    const int32_t base = (static_cast<int32_t>(exponents[begin / kMomentBlock]) - 31) * (1 << 23);
    for (int64_t k = begin; k < end; ++k) {
      const int32_t code = codes[k];
      // At most (255 - 31) 2^23 + 255 2^20 = 0x7ff00000, a NaN: no overflow.
      int32_t bits = base + (code << 20);
      bits = bits < 0 || code == 0 ? 0 : bits;
      memcpy(v + k, &bits, 4);
    }
  }
}

static void encode(const float* v, const uint32_t* random, int64_t c, uint8_t* codes,
                   uint8_t* exponents) {
  for (int64_t begin = 0; begin < c; begin += kMomentBlock) {
    const int64_t end = begin + kMomentBlock < c ? begin + kMomentBlock : c;
    uint32_t largest = 0;
    for (int64_t k = begin; k < end; ++k) {
      uint32_t bits;
      memcpy(&bits, v + k, 4);
      bits &= 0x7fffffffu;
      largest = bits > largest ? bits : largest;
    }
    const uint32_t exponent = (largest + (1u << 20)) >> 23;
    const int32_t field = exponent > 255 ? 255 : static_cast<int32_t>(exponent);
    exponents[begin / kMomentBlock] = static_cast<uint8_t>(field);
    for (int64_t k = begin; k < end; ++k) {
      int32_t bits;
      memcpy(&bits, v + k, 4);
      bits &= 0x7fffffff;  // a NaN may be negative
      // By eighths of an octave: above the base at most 2^28, below it as little as -2^31.
      int64_t code = (static_cast<int64_t>(bits) - (static_cast<int64_t>(field) - 31) * (1 << 23) +
                      static_cast<int64_t>(random[k] >> 12)) >>
                     20;
      code = code < 0 || bits == 0 ? 0 : code;
      code = code > 255 || bits > 0x7f800000 ? 255 : code;
      codes[k] = static_cast<uint8_t>(code);
    }
  }
}

static void round_bf16(const float* w, const uint32_t* random, int64_t c, uint16_t* out) {
  for (int64_t k = 0; k < c; ++k) {
    uint32_t bits;
    memcpy(&bits, w + k, 4);
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    out[k] = finite ? static_cast<uint16_t>((bits + (random[k] & 0xffffu)) >> 16) : to_bf16(w[k]);
  }
}

// Sixteen counters side by side, so that each round is a vector operation.
static void random_words(uint64_t seed, uint64_t row, uint64_t step, int64_t c, uint32_t* out) {
  constexpr int kCounters = kRandomBlock / 4;
  for (int64_t begin = 0; begin < c; begin += kRandomBlock) {
    uint32_t c0[kCounters], c1[kCounters], c2[kCounters], c3[kCounters];
    for (int i = 0; i < kCounters; ++i) {
      c0[i] = static_cast<uint32_t>(begin / 4 + i);
      c1[i] = static_cast<uint32_t>(row);
      c2[i] = static_cast<uint32_t>(row >> 32);
      c3[i] = static_cast<uint32_t>(step);
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 7; ++round) {
      for (int i = 0; i < kCounters; ++i) {
        const uint64_t p0 = static_cast<uint64_t>(c0[i]) * 0xd2511f53u;
        const uint64_t p1 = static_cast<uint64_t>(c2[i]) * 0xcd9e8d57u;
        c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
        c1[i] = static_cast<uint32_t>(p1);
        c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
        c3[i] = static_cast<uint32_t>(p0);
      }
      k0 += 0x9e3779b9u;
      k1 += 0xbb67ae85u;
    }
    for (int i = 0; i < kCounters; ++i) {
      uint32_t* words = out + begin + 4 * i;
      words[0] = c0[i];
      words[1] = c1[i];
      words[2] = c2[i];
      words[3] = c3[i];
    }
  }
}

extern const AdamRowTable kAdamRowTable;
const AdamRowTable kAdamRowTable = {any_nonzero, dots,   update,     divide,
                                    decode,      encode, round_bf16, random_words};

}  // namespace GSF_TARGET

// The selection is compiled once, with the generic variant.
#define GSF_IS_generic 1
#define GSF_JOIN_(a, b) a##b
#define GSF_JOIN(a, b) GSF_JOIN_(a, b)
#if GSF_JOIN(GSF_IS_, GSF_TARGET)

#if defined(__x86_64__)
namespace avx2 {
extern const AdamRowTable kAdamRowTable;
}
namespace avx512 {
extern const AdamRowTable kAdamRowTable;
}
#elif defined(__aarch64__)
namespace neon {
extern const AdamRowTable kAdamRowTable;
}
#endif

const AdamRowTable& adam_row_table(SimdTarget target) {
#if defined(__x86_64__)
  if (is_avx512(target)) return avx512::kAdamRowTable;
  if (is_avx2(target)) return avx2::kAdamRowTable;
#elif defined(__aarch64__)
  if (target == SimdTarget::kNeon) return neon::kAdamRowTable;
#endif
  (void)target;
  return generic::kAdamRowTable;
}

#endif

}  // namespace gemmascope_fast
