#include "cpu/packed_encoder.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace gemmascope_fast {
namespace {

constexpr char kOp[] = "pack_encoder";
constexpr int64_t kMagic = 0x32306b6361706773;  // "gspack02"
constexpr int64_t kHeaderBytes = 64;

struct Header {
  int64_t magic, d_in, d_sae, centered;
};

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }
int64_t center_bytes(const Header& h) { return h.centered == 0 ? 0 : round_up(h.d_in * 4, 64); }
int64_t block_bytes(int64_t d_in) {
  const int64_t d = screened_width(d_in);
  return kScreenBlock * (d + static_cast<int64_t>(sizeof(LatentStats)) + screen_chunks(d) * 4);
}
int64_t blocks_of(int64_t d_sae) { return round_up(d_sae, kScreenBlock) / kScreenBlock; }
int64_t total_bytes(const Header& h) {
  return kHeaderBytes + center_bytes(h) + blocks_of(h.d_sae) * block_bytes(h.d_in);
}

}  // namespace

PackedEncoder::PackedEncoder(const char* op, const Tensor& bytes, int64_t d_in, int64_t d_sae) {
  check_dim(op, "packed", bytes, 1);
  check_dtype(op, "packed", bytes, ScalarType::Byte);
  Header header = {};
  if (bytes.size(0) >= kHeaderBytes && bytes.stride(0) == 1) {
    std::memcpy(&header, bytes.data_ptr(), sizeof(header));
  }
  if (header.magic != kMagic || header.d_in != d_in || header.d_sae != d_sae ||
      bytes.size(0) != total_bytes(header)) {
    fail(op, "packed must come from pack() of a W_enc of shape [", d_in, ", ", d_sae, "]");
  }
  const uint8_t* data = static_cast<const uint8_t*>(bytes.data_ptr());
  if (reinterpret_cast<uintptr_t>(data) % 4 != 0) fail(op, "packed must be 4-byte aligned");
  d_ = screened_width(d_in);
  block_bytes_ = block_bytes(d_in);
  center_ = header.centered == 0 ? nullptr : reinterpret_cast<const float*>(data + kHeaderBytes);
  blocks_ = data + kHeaderBytes + center_bytes(header);
}

std::optional<PackedEncoder> packed_encoder(const char* op, const std::optional<Tensor>& bytes,
                                            const Tensor& W_enc) {
  if (!bytes) return std::nullopt;
  return PackedEncoder(op, *bytes, W_enc.size(0), W_enc.size(1));
}

Tensor pack_encoder_cpu(const Tensor& W_enc, std::optional<Tensor> center) {
  check_dim(kOp, "W_enc", W_enc, 2);
  check_float(kOp, "W_enc", W_enc);
  Header header = {kMagic, W_enc.size(0), W_enc.size(1), center.has_value()};
  std::optional<FloatVector> own;
  if (center) {
    check_dtype(kOp, "center", *center, ScalarType::Float);
    check_shape(kOp, "center", *center, {header.d_in});
    own.emplace(*center);
    double squares = 0;
    for (int64_t k = 0; k < header.d_in; ++k) squares += std::pow(own->data()[k], 2.0);
    if (squares == 0) header.centered = 0;
    if (squares != 0 && !(squares > 0x1p-60 && squares < 0x1p60)) {
      fail(kOp, "center must be finite, and its norm 0 or between 2^-30 and 2^30");
    }
  }
  Tensor bytes = new_tensor(W_enc, {total_bytes(header)}, ScalarType::Byte);
  uint8_t* data = static_cast<uint8_t*>(bytes.data_ptr());
  std::memset(data, 0, static_cast<size_t>(kHeaderBytes + center_bytes(header)));
  std::memcpy(data, &header, sizeof(header));
  if (header.centered != 0) {
    std::memcpy(data + kHeaderBytes, own->data(), static_cast<size_t>(header.d_in * 4));
  }
  const PaddedRows rows(features(W_enc));
  const float* with = header.centered == 0 ? nullptr : own->data();
  uint8_t* blocks = data + kHeaderBytes + center_bytes(header);
  const int64_t count = blocks_of(header.d_sae);
  std::vector<LatentScratch> scratch(static_cast<size_t>(parallel_slots(count)));
  parallel_tasks(count, [&](int64_t b, int64_t slot) {
    uint8_t* codes = blocks + b * block_bytes(header.d_in);
    auto* stats =
        reinterpret_cast<LatentStats*>(codes + kScreenBlock * screened_width(header.d_in));
    std::fill_n(stats, kScreenBlock, LatentStats{});
    const int64_t begin = b * kScreenBlock;
    if (header.d_in > 0) {
      quantise_latents(rows, begin, std::min(kScreenBlock, header.d_sae - begin), with,
                       scratch[static_cast<size_t>(slot)], codes, stats,
                       reinterpret_cast<float*>(stats + kScreenBlock));
    }
  });
  return bytes;
}

STABLE_TORCH_LIBRARY_FRAGMENT(gemmascope_fast, m) {
  m.def("pack_encoder(Tensor W_enc, Tensor? center) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast, CPU, m) { GSF_CPU_IMPL(m, kOp, pack_encoder_cpu); }

}  // namespace gemmascope_fast
