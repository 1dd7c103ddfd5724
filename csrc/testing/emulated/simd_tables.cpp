// Prints a digest of what every function of csrc/cpu/simd gives on fixed inputs, a line per case: for two processors to be
// compared, one of them emulated (tests/test_simd_emulated.py). Linked with csrc/cpu/simd/*.cpp compiled for GSF_TARGET.
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "cpu/simd/adam_row.h"
#include "cpu/simd/dot.h"
#include "cpu/simd/row.h"
#include "cpu/simd/screen.h"

namespace gemmascope_fast {

namespace GSF_TARGET {
extern const DotTable kDotTable;
extern const RowTable kRowTable;
extern const AdamRowTable kAdamRowTable;
extern const ScreenTable kScreenTable;
#if defined(GSF_NEON)
extern const ScreenTable kSdotScreenTable;
#endif
}  // namespace GSF_TARGET

namespace {

using namespace GSF_TARGET;
using Floats = std::vector<float>;

// ---- inputs: integer arithmetic alone, so that every processor has the same

uint64_t state = 1;
uint32_t word() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 32);
}
float uniform() { return static_cast<float>(static_cast<int32_t>(word())) * 0x1p-31f; }
Floats uniforms(int64_t count, float scale = 1.0f) {
  Floats out(static_cast<size_t>(count));
  for (float& v : out) v = uniform() * scale;
  return out;
}
template <typename T>
std::vector<T> words(int64_t count, uint32_t below = 0) {
  std::vector<T> out(static_cast<size_t>(count));
  for (T& v : out) v = static_cast<T>(below == 0 ? word() : word() % below);
  return out;
}
// Of a magnitude anywhere in the format, the special ones included.
float any_float() {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  const float special[] = {0.0f, -0.0f, kInf, -kInf, 0x1p-149f, kNan, 65520.0f, 0x1p-25f};
  const uint32_t bits = word();
  float v = special[bits % 8];
  if (word() % 4 != 0) memcpy(&v, &bits, 4);
  return v;
}
Floats any_floats(int64_t count) {
  Floats out(static_cast<size_t>(count));
  for (float& v : out) v = any_float();
  return out;
}

// ---- digests: FNV-1a of the bits; a NaN is a NaN

uint64_t digest;
void begin() { digest = 0xcbf29ce484222325u; }
template <typename T>
void take(T v) {
  unsigned char bytes[sizeof(T)];
  if (v != v) v = std::numeric_limits<T>::quiet_NaN();
  memcpy(bytes, &v, sizeof(T));
  for (unsigned char byte : bytes) digest = (digest ^ byte) * 0x100000001b3u;
}
template <typename T>
void take(const T* v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) take(v[i]);
}
template <typename T>
void take(const std::vector<T>& v) {
  take(v.data(), static_cast<int64_t>(v.size()));
}
void end(const std::string& what) {
  printf("%s: %016llx\n", what.c_str(), static_cast<unsigned long long>(digest));
}
std::string at(const char* what, std::initializer_list<int64_t> sizes) {
  std::string text = what;
  for (int64_t size : sizes) text += " " + std::to_string(size);
  return text;
}

// ---- cases

void dots(int64_t d) {
  constexpr int64_t kRows = 7, kLatents = 9;
  const Floats x = uniforms(kRows * d), w = uniforms(kLatents * d);
  Floats state(static_cast<size_t>(kRows * kLatents * 16)), out(kRows * kLatents);
  begin();
  for (int64_t rows = 1; rows <= kDotTable.tile_rows; ++rows) {
    std::fill(out.begin(), out.end(), 0.0f);
    for (int64_t r = 0; r < kRows; r += rows) {
      kDotTable.panel(x.data() + r * d, d, std::min(rows, kRows - r), w.data(), d, kLatents, d,
                      state.data(), out.data() + r * kLatents, kLatents);
    }
    if (rows == 1) take(out);
    if (rows > 1) {
      const uint64_t before = digest;
      begin();
      take(out);
      if (digest != before) end(at("panel of rows", {rows}));  // that other rows disagree with
      digest = before;
    }
  }
  end(at("panel", {d}));
  std::vector<const float*> xs;
  for (int64_t i = 0; i < kRows; ++i) xs.push_back(x.data() + i * d);
  const std::vector<uint16_t> halves = words<uint16_t>(kRows * d);
  for (int dtype = 0; dtype < 3; ++dtype) {
    std::vector<const void*> ws;
    for (int64_t i = 0; i < kRows; ++i) {
      ws.push_back(dtype == 0 ? static_cast<const void*>(w.data() + (i + 2) * d)
                              : halves.data() + i * d);
    }
    begin();
    for (int64_t block : {d, int64_t{16}, int64_t{48}}) {
      kDotTable.pairs(xs.data(), ws.data(), dtype, kRows, d, block, state.data(), out.data());
      take(out.data(), kRows);
    }
    end(at("pairs", {d, dtype}));
  }
}

void above(int64_t count, int64_t limit_stride) {
  Floats dots = any_floats(count), bias = any_floats(count), limit = any_floats(count + 1);
  for (int64_t i = 0; i < count; i += 3) limit[i * limit_stride] = dots[i] + bias[i];
  std::vector<int32_t> position(static_cast<size_t>(count + 16));
  Floats pre(position.size());
  const int64_t found = kDotTable.above(dots.data(), bias.data(), limit.data(), limit_stride, count,
                                        position.data(), pre.data());
  begin();
  take(found);
  take(position.data(), found);
  take(pre.data(), found);
  end(at("above", {count, limit_stride}));
}

void widths() {
  std::vector<uint16_t> halves(1 << 16);
  for (size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<uint16_t>(i);
  Floats out(halves.size());
  for (int dtype : {1, 2}) {
    begin();
    kDotTable.widen(halves.data(), dtype, 1 << 16, out.data());
    take(out);
    for (int64_t count = 0; count < 40; ++count) {
      kDotTable.widen(halves.data() + 16000, dtype, count, out.data());
      take(out.data(), count);
      kRowTable.widen(dtype, halves.data() + 16000, count, out.data());
      take(out.data(), count);
    }
    end(at("widen", {dtype}));
    const Floats wide = any_floats(5000);
    begin();
    kRowTable.narrow(dtype, wide.data(), 5000, halves.data());
    take(halves.data(), 5000);
    end(at("narrow", {dtype}));
    for (size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<uint16_t>(i);
  }
}

void transpose(int dtype, int64_t rows, int64_t cols) {
  const std::vector<float> source = uniforms(rows * cols);  // as halves: any bits
  Floats out(static_cast<size_t>((rows + 3) * cols));
  begin();
  kDotTable.transpose(source.data(), cols, dtype, rows, cols, out.data(), rows + 3);
  take(out);
  end(at("transpose", {dtype, rows, cols}));
}

void gathers(int dtype, int64_t d) {
  constexpr int64_t kSource = 12, kCount = 11;
  std::vector<uint16_t> halves = words<uint16_t>(kSource * d, 0x3c00);
  const Floats floats = uniforms(kSource * d);
  const void* data = dtype == 0 ? static_cast<const void*>(floats.data()) : halves.data();
  const RowSource source = {data, dtype, d * (dtype == 0 ? 4 : 2)};
  const auto indices = words<int32_t>(kCount, kSource);
  const Floats coef = uniforms(kCount), g = uniforms(d);
  begin();
  for (int64_t count = 0; count <= kCount; ++count) {
    Floats acc = g, out(kCount);
    kRowTable.gather(source, indices.data(), coef.data(), count, kCount, d, acc.data());
    take(acc);
    kRowTable.gather_dot(source, indices.data(), count, kCount, d, g.data(), out.data());
    take(out);
  }
  end(at("gather", {dtype, d}));
}

void sweeps(int64_t d) {
  const Floats rows = uniforms(4 * d), w = uniforms(d), coef = uniforms(4);
  const float* row[] = {&rows[0], &rows[d], &rows[2 * d], &rows[3 * d]};
  const RowAhead ahead = {rows.data(), 4};
  begin();
  for (int count = 1; count <= 4; ++count) {
    for (bool first : {false, true}) {
      Floats acc = w, dots(4);
      kRowTable.axpy(row, coef.data(), count, first, d, ahead, acc.data());
      take(acc);
      kRowTable.dot_axpy(row, coef.data(), count, first, d, w.data(), ahead, acc.data(),
                         dots.data());
      take(acc);
      take(dots);
    }
  }
  Floats streamed = w;
  kRowTable.stream(rows.data(), d * 4 - 4, streamed.data() + 1);
  kRowTable.stream_fence();
  take(streamed);
  end(at("sweep", {d}));
}

void adam(int64_t c) {
  const int64_t blocks = (c + kMomentBlock - 1) / kMomentBlock;
  std::vector<uint32_t> random(static_cast<size_t>(c + kRandomBlock));
  std::vector<uint8_t> codes(static_cast<size_t>(c)), exponents(static_cast<size_t>(blocks));
  std::vector<uint16_t> halves(static_cast<size_t>(c));
  const Floats g = uniforms(c, 0x1p-8f);
  Floats m = uniforms(c), v = uniforms(c), w = uniforms(c), special = any_floats(c), out(2);
  for (float& second : v) second = second * second * 0x1p-12f;
  begin();
  kAdamRowTable.random(word(), 7, 9, c, random.data());
  take(random.data(), c);
  for (float parallel : {0.0f, 0.25f}) {
    const AdamScalars s = {1e-3f, 0.9f, 0.1f, 0.99f, 0.01f, 1.25f, 1e-8f, parallel};
    kAdamRowTable.update(s, g.data(), m.data(), v.data(), w.data(), c, {});
    kAdamRowTable.update(s, nullptr, nullptr, v.data(), w.data(), c, {w.data(), 4});
  }
  kAdamRowTable.divide(1.7f, w.data(), c);
  kAdamRowTable.dots(g.data(), w.data(), c, out.data());
  for (Floats* each : {&m, &v, &w, &out}) take(*each);
  for (Floats* each : {&v, &special}) {
    kAdamRowTable.encode(each->data(), random.data(), c, codes.data(), exponents.data());
    take(codes);
    take(exponents);
    kAdamRowTable.round_bf16(each->data(), random.data(), c, halves.data());
    take(halves);
  }
  kAdamRowTable.decode(codes.data(), exponents.data(), c, v.data());
  take(v);
  take(static_cast<int>(kAdamRowTable.any_nonzero(g.data(), c)));
  end(at("adam", {c}));
}

// Sixteen rows, one in a lane. Row 3 has one large element in a hundred, row 5 is zero, row 7 is not finite; of row 13, which
// a single transform makes multiples of a half up to 127, codes are rounded from halfway.
Floats transposed_rows(int64_t d) {
  Floats rows = uniforms(d * kGroupRows);
  for (int64_t k = 0; k < d; ++k) {
    float* lanes = rows.data() + k * kGroupRows;
    if (k % 100 == 3) lanes[3] *= 300.0f;
    lanes[5] = 0.0f;
    if (k == 9) lanes[7] = std::numeric_limits<float>::quiet_NaN();
    lanes[11] *= 0x1p-30f;
    lanes[13] = k == 0 ? 64.0f : k == 1 ? 62.75f : k == 2 ? 0.25f : 0.0f;
  }
  return rows;
}

struct Quantised {
  std::vector<int8_t> codes, fine;
  QuantisedRows rows;
  std::vector<QuantisedChunk> chunks;
};

Quantised quantised(int64_t count, int64_t d, bool centred, bool finer) {
  const Floats rows = transposed_rows(count), subtract = uniforms(count), with = uniforms(count);
  Floats work(static_cast<size_t>(d * kGroupRows));
  Quantised q;
  q.codes.resize(work.size());
  q.fine.resize(work.size());
  q.chunks.resize(static_cast<size_t>(d / screen_chunk(d)));
  kScreenTable.quantise(rows.data(), count, d, kLatentCode, centred ? subtract.data() : nullptr,
                        centred ? nullptr : with.data(), work.data(), q.codes.data(),
                        finer ? q.fine.data() : nullptr, &q.rows, q.chunks.data());
  return q;
}

void quantise(int64_t count, int64_t d, bool centred, bool finer) {
  const Quantised q = quantised(count, d, centred, finer);
  begin();
  for (int64_t r = 0; r < kGroupRows; ++r) {
    if (r == 7) continue;  // what is not finite has no codes
    for (int64_t k = 0; k < d; ++k) {
      take(static_cast<int>(q.codes[k / 4 * 64 + r * 4 + k % 4]));
      take(static_cast<int>(q.fine[k / 4 * 64 + r * 4 + k % 4]));
    }
    for (float v : {q.rows.largest[r], q.rows.raw_squared[r], q.rows.dot[r]}) take(v);
    for (const QuantisedChunk& c : q.chunks) {
      for (float v : {c.scale[r], c.y_squared[r], c.p_squared[r], c.error_squared[r]}) take(v);
      if (finer) take(c.fine_squared[r]);
      take(c.sum[r]);
    }
  }
  end(at("quantise", {count, d, centred, finer}));
}

void tiles(const ScreenTable& table, int64_t d) {
  const int64_t width = screen_chunk(d), chunks = d / width;
  const auto x = words<int8_t>(kGroupRows * d);
  const auto w = words<uint8_t>(kScreenBlock * d);
  const Floats w_scale = uniforms(chunks * kScreenBlock), x_scale = uniforms(chunks * kScreenRows);
  std::vector<int32_t> sums(static_cast<size_t>(chunks * kScreenRows));
  for (int64_t k = 0; k < d; ++k) {
    for (int64_t r = 0; r < kScreenRows; ++r) {
      sums[k / width * kScreenRows + r] += x[k / 4 * 64 + (r + 8) * 4 + k % 4];
    }
  }
  ScreenLatents latents = {};
  for (float* each : {latents.base, latents.slope, latents.alpha, latents.beta}) {
    for (int64_t j = 0; j < kScreenBlock; ++j) each[j] = uniform() * 1e4f;
  }
  latents.scale = w_scale.data();
  latents.beta[17] = std::numeric_limits<float>::infinity();
  ScreenTokens tokens = {};
  for (float* each : {tokens.a, tokens.b, tokens.limit}) {
    for (int64_t r = 0; r < kScreenRows; ++r) each[r] = uniform();
  }
  tokens.scale = x_scale.data();
  tokens.sum = sums.data();
  std::vector<const char*> ahead(static_cast<size_t>(d / kScreenUnit), "");
  begin();
  for (int64_t rows = 1; rows <= kScreenRows; ++rows) {
    Floats products(kScreenRows * kScreenBlock);
    uint64_t masks[kScreenRows] = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const ScreenTile tile = {w.data(), x.data() + 32, rows, d, chunk, width, ahead.data()};
      table.tile(tile, latents, tokens, masks, products.data());
    }
    take(masks, rows);
    take(products.data(), rows * kScreenBlock);
  }
  end(at("tile", {d}));
}

void fine_dots(const ScreenTable& table, int64_t d) {
  constexpr int64_t kPairs = 9;
  const int64_t chunks = d / screen_chunk(d);
  const auto x = words<int8_t>(kPairs * d);
  const auto w = words<uint8_t>(kPairs * d);
  const Floats w_scale = uniforms(chunks * kScreenBlock), x_scale = uniforms(chunks * kScreenRows);
  std::vector<FinePair> pairs;
  for (int64_t i = 0; i < kPairs; ++i) {
    pairs.push_back({w.data() + i * d, w_scale.data() + i, x.data() + i * d, x_scale.data()});
  }
  begin();
  for (int64_t count = 0; count <= kPairs; ++count) {
    Floats out(kPairs);
    table.fine_dots(pairs.data(), count, d, out.data());
    take(out);
  }
  end(at("fine_dots", {d}));
}

void screens(const ScreenTable& table) {
  state = 2;
  for (int64_t d : {64, 320, 768, 1152, 2304}) tiles(table, d);
  for (int64_t d : {64, 320, 2304}) fine_dots(table, d);
}

void run() {
  for (int64_t d : {16, 64, 1152, 1168, 2400}) dots(d);
  for (int64_t count = 0; count < 40; ++count) above(count, count % 2);
  widths();
  for (int dtype : {0, 1, 2}) {
    for (int64_t rows : {1, 5, 16, 35}) transpose(dtype, rows, 301);
    for (int64_t d : {5, 16, 203}) gathers(dtype, d);
  }
  for (int64_t d : {1, 16, 333}) sweeps(d);
  for (int64_t c : {1, 128, 777}) adam(c);
  for (int64_t d : {64, 128, 256, 320, 2304}) {
    for (bool centred : {false, true}) quantise(d - 3, d, centred, !centred);
  }
  screens(kScreenTable);
#if defined(GSF_NEON)
  screens(kSdotScreenTable);
#endif
}

}  // namespace
}  // namespace gemmascope_fast

int main() { gemmascope_fast::run(); }
