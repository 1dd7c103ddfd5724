// What the calling thread's last encoder did: for gsf.explain().
#pragma once

#include <cstdint>

namespace gemmascope_fast {

struct EncodeReport {
  const char* op = nullptr;
  const char* target = nullptr;      // null: that of the CPU's kernels
  const char* why_direct = nullptr;  // null: screened
  const char* layout = "";           // of W_enc: "feature-major", "row-major" or "strided"
  bool packed = false, centered = false;
  int64_t n = 0, d_in = 0, d_sae = 0;
  int64_t screened_blocks = 0, direct_blocks = 0, candidates = 0, rescored = 0;
};

void set_encode_report(const EncodeReport& report);

}  // namespace gemmascope_fast
