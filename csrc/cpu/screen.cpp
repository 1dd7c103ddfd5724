#include "cpu/screen.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/parallel.h"

namespace gemmascope_fast {

namespace generic {
extern const ScreenTable kScreenTable;
}
#if defined(__x86_64__)
namespace avx2 {
extern const ScreenTable kScreenTable, kVnniScreenTable, kVexScreenTable;
}
namespace avx512 {
extern const ScreenTable kScreenTable, kVnniScreenTable, kAmxScreenTable;
}
#elif defined(__aarch64__)
namespace neon {
extern const ScreenTable kScreenTable, kSdotScreenTable;
}
#endif

const ScreenTable& screen_table(SimdTarget target) {
#if defined(__x86_64__)
#if GSF_AMX
  if (target == SimdTarget::kAvx512Amx) return avx512::kAmxScreenTable;
#endif
  if (target == SimdTarget::kAvx512) {
    static const bool vnni = has_avx512_vnni();
    return vnni ? avx512::kVnniScreenTable : avx512::kScreenTable;
  }
#if GSF_AVX_VNNI
  static const bool vex = has_avx_vnni();
  if (target == SimdTarget::kAvx2Vnni && vex) return avx2::kVexScreenTable;
#endif
  if (target == SimdTarget::kAvx2Vnni) return avx2::kVnniScreenTable;
  if (target == SimdTarget::kAvx2) return avx2::kScreenTable;
#elif defined(__aarch64__)
  if (target == SimdTarget::kNeon) {
    static const bool sdot = has_sdot();
    return sdot ? neon::kSdotScreenTable : neon::kScreenTable;
  }
#endif
  (void)target;
  return generic::kScreenTable;
}

namespace {

constexpr double kUnit = 0x1p-24;  // rounding of one float32 operation, relative
constexpr double kInf = std::numeric_limits<double>::infinity();
// Sums of squares have a relative error of (d / 4 + 8) units, 2^-10 at most, their roots half of that, products a few units.
constexpr double kInflate = 1 + 0x1p-10;
// Rounding of a transform: 8 stages, the subtraction of the centre, the division by the scale, which is rounded itself.
constexpr double kTransform = 14 * kUnit;
// Of the bound's arithmetic and of both stages' products, relative to |X| |W|. A code is at most twice what it stands for,
// |S q| |R p| <= 4 |X| |W|, which bounds every partial sum over the chunks; a chunk's part takes three roundings (conversion,
// two scales), its addition one more. The fine product is a half of the coarse one at most, its lanes add up in four steps.
double bound_rounding(int64_t chunks) { return (32 + 8 * static_cast<double>(chunks + 7)) * kUnit; }
constexpr float kSmallest = 0x1p-40f, kLargest = 0x1p40f;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// False where rounding could be larger than the bounds assume: overflow, underflow, NaN.
bool in_range(float largest, float raw_squared) {
  if (!(raw_squared < 0x1p100f)) return false;
  if (largest == 0.0f) return raw_squared == 0.0f || raw_squared > 0x1p-90f;
  return largest >= kSmallest && largest <= kLargest;
}

// At most v, by more than the float32 arithmetic that follows can add. Where a row of zeros leaves no margin the sign decides:
// a negative value must not be flushed to zero. Elsewhere 2^-110 is below the margin.
float lower(double v) {
  if (std::isinf(v)) return static_cast<float>(v);
  const double low = v - std::abs(v) * 0x1p-21;
  return static_cast<float>(v < 0 ? std::min(low, -0x1p-110) : low);
}

// Sums over a row's chunks, from code units to those of X or W.
struct Norms {
  double size = 0, coded = 0, error = 0, rest = 0;
};
Norms norms(const QuantisedChunk* chunks, int64_t count, int64_t r) {
  Norms out;
  for (int64_t c = 0; c < count; ++c) {
    const double squared = std::pow(static_cast<double>(chunks[c].scale[r]), 2);
    out.size += squared * chunks[c].y_squared[r];
    out.coded += squared * chunks[c].p_squared[r];
    out.error += squared * chunks[c].error_squared[r];
    out.rest += squared * chunks[c].fine_squared[r];
  }
  return {std::sqrt(out.size), std::sqrt(out.coded), std::sqrt(out.error), std::sqrt(out.rest)};
}

}  // namespace

int64_t screened_width(int64_t d_in) { return divide_up(d_in, kScreenUnit) * kScreenUnit; }

ScreenedTokens::ScreenedTokens(const float* x, int64_t x_stride, int64_t n, int64_t d_in,
                               const float* center)
    : table_(n <= kScreenRows && screens().few != nullptr ? *screens().few : screens()),
      x_(x),
      x_stride_(x_stride),
      d_in_(d_in),
      d_(screened_width(d_in)),
      chunks_(screen_chunks(d_)),
      center_(center) {
  const size_t rows = static_cast<size_t>(divide_up(n, kGroupRows) * kGroupRows);
  codes_.resize(rows * static_cast<size_t>(d_));
  fine_codes_.resize(codes_.size());
  scales_.resize(rows * static_cast<size_t>(chunks_));
  sums_.resize(scales_.size());
  tokens_.resize(rows / kScreenRows);
  fine_.resize(rows);
  for (int64_t k = 0; center != nullptr && k < d_in; ++k) {
    center_norm_ += static_cast<double>(center[k]) * center[k];
  }
  center_norm_ = std::sqrt(center_norm_);
  parallel_ranges(n, kGroupRows, [&](int64_t begin, int64_t end) {
    FloatBuffer lanes, work;
    std::vector<int8_t> fine(static_cast<size_t>(d_ * kGroupRows));
    std::vector<QuantisedChunk> chunks(static_cast<size_t>(chunks_));
    quantise(begin, end - begin, lanes.reserve(d_ * kGroupRows), work.reserve(d_ * kGroupRows),
             fine.data(), chunks.data());
  });
}

void ScreenedTokens::quantise(int64_t row, int64_t count, float* lanes, float* work, int8_t* fine,
                              QuantisedChunk* chunks) {
  if (count < kGroupRows) std::fill(lanes, lanes + d_in_ * kGroupRows, 0.0f);
  dot_table(simd_target())
      .transpose(x_ + row * x_stride_, x_stride_, 0, count, d_in_, lanes, kGroupRows);
  QuantisedRows q;
  table_.quantise(lanes, d_in_, d_, table_.token_code, center_, nullptr, work,
                  codes_.data() + row * d_, fine, &q, chunks);
  if (table_.arrange != nullptr) table_.arrange(codes_.data() + row * d_, d_);
  codes_to_rows(fine, d_, fine_codes_.data() + row * d_);
  const double root = std::sqrt(static_cast<double>(hadamard_block(d_)));
  const double dot_rounding = (static_cast<double>(d_in_) / 16 + 8) * kUnit;
  const double center_rounding = (static_cast<double>(d_) / 16 + 16) * kUnit;
  for (int64_t r = 0; r < kGroupRows; ++r) {
    const int64_t tile = (row + r) / kScreenRows, at = r % kScreenRows;
    const bool real = r < count, ok = in_range(q.largest[r], q.raw_squared[r]);
    float* scales = scales_.data() + tile * kScreenRows * chunks_;
    int32_t* sums = sums_.data() + tile * kScreenRows * chunks_;
    for (int64_t c = 0; c < chunks_; ++c) {
      scales[c * kScreenRows + at] = ok ? chunks[c].scale[r] : 1.0f;
      sums[c * kScreenRows + at] = chunks[c].sum[r];
    }
    const Norms own = norms(chunks, chunks_, r);
    const double rounding = (2 * kTransform + bound_rounding(chunks_)) * own.size +
                            dot_rounding * std::sqrt(q.raw_squared[r]) * root +
                            center_rounding * center_norm_ * root;
    ScreenTokens& tokens = tokens_[static_cast<size_t>(tile)];
    tokens.a[at] = real && ok ? static_cast<float>(own.coded * kInflate) : 0.0f;
    tokens.b[at] = static_cast<float>(!real ? 0.0 : ok ? (own.error + rounding) * kInflate : kInf);
    tokens.limit[at] = 0.0f;
    tokens.scale = scales;
    tokens.sum = sums;
    fine_[static_cast<size_t>(row + r)] = {
        static_cast<float>((own.size + own.rest + rounding) * kInflate),
        static_cast<float>(ok ? (own.rest + rounding) * kInflate : kInf)};
  }
}

void quantise_latents(const PaddedRows& w, int64_t begin, int64_t count, const float* center,
                      LatentScratch& scratch, uint8_t* codes, LatentStats* stats, float* scales) {
  const int64_t d = screened_width(w.cols()), chunks = screen_chunks(d);
  float* lanes = scratch.lanes.reserve(d * kGroupRows);
  float* work = scratch.work.reserve(d * kGroupRows);
  scratch.chunks.resize(static_cast<size_t>(chunks));
  for (int64_t g = 0; g < kScreenGroups; ++g) {
    const int64_t first = g * kGroupRows;
    const int64_t rows = std::clamp<int64_t>(count - first, 0, kGroupRows);
    uint8_t* own = codes + first * d;
    for (int64_t c = 0; c < chunks; ++c) {
      std::fill_n(scales + c * kScreenBlock + first, kGroupRows, 1.0f);
    }
    if (rows == 0) {  // beyond d_sae
      std::fill(own, own + kGroupRows * d, uint8_t{0x80});
      continue;
    }
    QuantisedRows q;
    w.lanes(begin + first, rows, scratch.rows, lanes);
    screens().quantise(lanes, w.cols(), d, kLatentCode, nullptr, center, work,
                       reinterpret_cast<int8_t*>(own), nullptr, &q, scratch.chunks.data());
    for (int64_t i = 0; i < kGroupRows * d; ++i) own[i] ^= 0x80;
    for (int64_t r = 0; r < rows; ++r) {
      const bool ok = in_range(q.largest[r], q.raw_squared[r]) && std::isfinite(q.dot[r]);
      const Norms norm = norms(scratch.chunks.data(), chunks, r);
      const double error = (norm.error + kTransform * norm.size) * kInflate;
      stats[first + r] = {static_cast<float>(ok ? norm.size * kInflate : kInf),
                          static_cast<float>(ok ? error : 0.0), ok ? q.dot[r] : 0.0f};
      for (int64_t c = 0; c < chunks && ok; ++c) {
        scales[c * kScreenBlock + first + r] = scratch.chunks[static_cast<size_t>(c)].scale[r];
      }
    }
  }
}

ScreenLatents screen_latents(const EncodeLimits& limits, const LatentBlock& block, int64_t begin,
                             int64_t count, int64_t d) {
  const double size = static_cast<double>(hadamard_block(d));
  ScreenLatents out = {};
  out.scale = block.scales;
  for (int64_t l = 0; l < count; ++l) {
    const LatentStats& own = block.stats[l];
    const double limit = limits.latent == nullptr ? 0.0 : limits.latent[begin + l];
    // bias and limit are float32: their difference is exact, or one rounding of its own size away.
    out.base[l] = lower((limit - limits.bias[begin + l] - own.dot) * size);
    out.slope[l] = limits.latent == nullptr ? lower(size) : 0.0f;
    out.alpha[l] = own.error;
    out.beta[l] = own.size;
    if (std::isinf(own.size)) out.base[l] = out.slope[l] = 0.0f;
  }
  return out;
}

void codes_to_rows(const void* codes, int64_t d, void* rows) {
  const DotTable& table = dot_table(simd_target());
  const int64_t quads = d / 4;
  for (int64_t k = 0; k < quads; k += kGroupRows) {
    table.transpose(static_cast<const float*>(codes) + k * kGroupRows, kGroupRows, 0, kGroupRows,
                    kGroupRows, static_cast<float*>(rows) + k, quads);
  }
}

std::vector<float> choose_center(const float* x, int64_t x_stride, int64_t n, int64_t d) {
  constexpr int64_t kSample = 256;
  const int64_t count = std::min(n, kSample);
  if (count < 2) return {};
  std::vector<double> sum(static_cast<size_t>(d), 0.0);
  double squares = 0, mean_squares = 0;
  for (int64_t s = 0; s < count; ++s) {
    const float* row = x + s * n / count * x_stride;
    for (int64_t k = 0; k < d; ++k) {
      const double v = row[k];
      sum[static_cast<size_t>(k)] += v;
      squares += v * v;
    }
  }
  std::vector<float> center(static_cast<size_t>(d));
  for (int64_t k = 0; k < d; ++k) {
    const double mean = sum[static_cast<size_t>(k)] / static_cast<double>(count);
    center[static_cast<size_t>(k)] = static_cast<float>(mean);
    mean_squares += mean * mean;
  }
  // Rows without a common part have mean squares of squares / count / count.
  const double share = mean_squares * static_cast<double>(count) / squares;
  const bool worth = share > 0.1 + 2.0 / static_cast<double>(count) && mean_squares > 0x1p-60 &&
                     mean_squares < 0x1p60;
  return worth ? center : std::vector<float>();
}

}  // namespace gemmascope_fast
