#include "cpu/encode_report.h"

#include <torch/csrc/stable/library.h>

#include <chrono>
#include <cstring>
#include <sstream>
#include <string>

#include "cpu/memory.h"
#include "cpu/screen.h"

namespace gemmascope_fast {
namespace {

constexpr char kOp[] = "encode_report";

thread_local EncodeReport last;
thread_local int64_t at = 0;  // when it was set, in ns of the clock of Python's time.monotonic_ns

std::string json() {
  std::ostringstream text;
  if (last.op == nullptr) return "{}";
  const bool cpu = last.target == nullptr;
  text << "{\"op\": \"" << last.op << "\", \"target\": \""
       << (cpu ? simd_target_name(simd_target()) : last.target)
       << "\", \"int8\": " << (!cpu || screens().fast ? "true" : "false") << ", \"path\": \""
       << (last.why_direct == nullptr ? "screened" : "direct") << "\", \"reason\": \""
       << (last.why_direct == nullptr ? "" : last.why_direct) << "\", \"layout\": \"" << last.layout
       << "\", \"packed\": " << (last.packed ? "true" : "false")
       << ", \"centered\": " << (last.centered ? "true" : "false") << ", \"n\": " << last.n
       << ", \"d_in\": " << last.d_in << ", \"d_sae\": " << last.d_sae
       << ", \"screened_blocks\": " << last.screened_blocks
       << ", \"direct_blocks\": " << last.direct_blocks << ", \"candidates\": " << last.candidates
       << ", \"rescored\": " << last.rescored << ", \"at\": " << at << "}";
  return text.str();
}

}  // namespace

void set_encode_report(const EncodeReport& report) {
  last = report;
  at = std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The report of this thread's last encoder as JSON bytes; `like` only chooses the device.
Tensor encode_report_cpu(const Tensor& like) {
  const std::string text = json();
  Tensor bytes = new_tensor(like, {static_cast<int64_t>(text.size())}, ScalarType::Byte);
  std::memcpy(bytes.data_ptr(), text.data(), text.size());
  return bytes;
}

STABLE_TORCH_LIBRARY_FRAGMENT(gemmascope_fast, m) { m.def("encode_report(Tensor like) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast, CPU, m) { GSF_CPU_IMPL(m, kOp, encode_report_cpu); }

}  // namespace gemmascope_fast
