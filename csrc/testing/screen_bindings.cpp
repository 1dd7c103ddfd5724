// One tile of the screen, and its second stage's dots, on any target that this processor has.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "cpu/screen.h"
#include "testing/registry.h"

namespace gemmascope_fast {
namespace {

namespace py = pybind11;
template <class T>
using In = py::array_t<T, py::array::c_style | py::array::forcecast>;

void require(bool ok, const char* message) {
  if (!ok) throw py::value_error(message);
}

const ScreenTable& screens_of(SimdTarget target) {
  require(simd_target_available(target), "this processor or build does not have the target");
  return screen_table(target);
}

// Rows of d codes as groups of kGroupRows: [d / 4][16][4].
Codes<int8_t> grouped(const In<int8_t>& rows, int64_t groups, int flip) {
  const int64_t d = rows.shape(1);
  Codes<int8_t> out(static_cast<size_t>(groups * kGroupRows * d));
  for (int64_t r = 0; r < rows.shape(0); ++r) {
    int8_t* group = out.data() + r / kGroupRows * kGroupRows * d;
    for (int64_t k = 0; k < d; ++k) {
      const int8_t code = static_cast<int8_t>(*rows.data(r, k) ^ flip);
      group[k / 4 * kGroupRows * 4 + r % kGroupRows * 4 + k % 4] = code;
    }
  }
  return out;
}

// The tile of x [rows, d] and w [kScreenBlock, d], int8 codes, with scales x_scale [chunks, kGroupRows] and w_scale [chunks,
// kScreenBlock]: products [rows, kScreenBlock], and the mask of those above `bound` [kScreenBlock].
py::tuple screen_tile(SimdTarget target, const In<int8_t>& x, const In<int8_t>& w,
                      const In<float>& x_scale, const In<float>& w_scale, const In<float>& bound) {
  const ScreenTable& table = screens_of(target);
  const int64_t rows = x.shape(0), d = x.shape(1), width = screen_chunk(d), chunks = d / width;
  require(rows > 0 && rows <= table.rows && w.shape(0) == kScreenBlock && w.shape(1) == d &&
              d % kScreenUnit == 0 && x_scale.size() == chunks * kGroupRows &&
              w_scale.size() == chunks * kScreenBlock && bound.size() == kScreenBlock,
          "sizes differ");
  Codes<int8_t> own_x = grouped(x, 1, 0);
  const Codes<int8_t> own_w = grouped(w, kScreenGroups, 0x80);
  if (table.arrange != nullptr) table.arrange(own_x.data(), d);
  std::vector<int32_t> sum(static_cast<size_t>(chunks * kGroupRows));
  std::vector<float> scale(sum.size());
  for (int64_t r = 0; r < kGroupRows; ++r) {  // panels of kScreenRows, one after the other
    int64_t at = r / kScreenRows * chunks * kScreenRows + r % kScreenRows;
    for (int64_t c = 0; c < chunks; ++c, at += kScreenRows) {
      scale[static_cast<size_t>(at)] = *x_scale.data(c, r);
      for (int64_t k = c * width; r < rows && k < (c + 1) * width; ++k) {
        sum[static_cast<size_t>(at)] += *x.data(r, k);
      }
    }
  }
  ScreenLatents latents = {};
  std::copy_n(bound.data(), kScreenBlock, latents.base);
  latents.scale = w_scale.data();
  ScreenTokens tokens[kGroupRows / kScreenRows] = {};
  for (int64_t panel = 0; panel < kGroupRows / kScreenRows; ++panel) {
    tokens[panel].scale = scale.data() + panel * chunks * kScreenRows;
    tokens[panel].sum = sum.data() + panel * chunks * kScreenRows;
  }
  const std::vector<const char*> ahead(static_cast<size_t>(2 * width / kScreenUnit),
                                       reinterpret_cast<const char*>(own_w.data()));
  uint64_t masks[kGroupRows];
  float products[kGroupRows * kScreenBlock];
  if (table.begin != nullptr) table.begin();
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const ScreenTile tile = {reinterpret_cast<const uint8_t*>(own_w.data()),
                             own_x.data(),
                             rows,
                             d,
                             chunk,
                             width,
                             ahead.data()};
    table.tile(tile, latents, tokens[0], masks, products);
  }
  if (table.end != nullptr) table.end();
  py::array_t<float> out({rows, kScreenBlock});
  std::copy_n(products, rows * kScreenBlock, out.mutable_data());
  return py::make_tuple(out, py::array_t<uint64_t>(rows, masks));
}

// fine_dots of rows i of w and x [count, d], all chunks' scales 1.
py::array_t<float> screen_fine_dots(SimdTarget target, const In<int8_t>& x, const In<int8_t>& w) {
  const ScreenTable& table = screens_of(target);
  const int64_t count = x.shape(0), d = x.shape(1);
  require(w.shape(0) == count && w.shape(1) == d && d % kScreenUnit == 0, "sizes differ");
  std::vector<uint8_t> codes(w.data(), w.data() + w.size());
  for (uint8_t& code : codes) code ^= 0x80;
  const std::vector<float> scale(static_cast<size_t>(screen_chunks(d) * kScreenBlock), 1.0f);
  std::vector<FinePair> pairs;
  for (int64_t i = 0; i < count; ++i) {
    pairs.push_back({codes.data() + i * d, scale.data(), x.data() + i * d, scale.data()});
  }
  py::array_t<float> out(count);
  table.fine_dots(pairs.data(), count, d, out.mutable_data());
  return out;
}

const BindLater later([](py::module_& m) {
  m.def("screen_token_code", [](SimdTarget target) { return screens_of(target).token_code; });
  m.def("screen_tile_rows", [](SimdTarget target) { return screens_of(target).rows; });
  m.def("screen_chunk", &screen_chunk, py::arg("d"));
  m.def("screen_tile", &screen_tile);
  m.def("screen_fine_dots", &screen_fine_dots);
});

}  // namespace
}  // namespace gemmascope_fast
