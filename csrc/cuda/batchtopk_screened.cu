// Host side of the screened BatchTopK encoder.
//
//   what pre can be at most, the largest of the batch   upper_bounds.h, batchtopk_scan.h
//   those -> pre-activations                            rescore_kernel.cuh
//   pre-activations -> the best of the batch            batchtopk_scan.h
//
// Bound by the int8 products, 2 n d_in d_sae operations, and 2 d_in bytes per pre-activation.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "cuda/batchtopk_screened.h"
#include "cuda/runtime.h"
#include "cuda/upper_bounds.h"

namespace gemmascope_fast {
inline namespace on_cuda {
namespace {

struct Call {
  const char* op;
  cudaStream_t stream;
  const Tensor &x, &W_enc, &bias;
  ScreenedEncoder packed;
  int64_t n = x.size(0), d_sae = W_enc.size(1);
};

// Uppers kept of a batch. About count exp(z m) of them reach the cut (screened_room of topk_screened_kernel.cuh), 1.4
// count at 262,144 latents and k = 64; each costs a pre-activation.
int64_t room_of(int64_t count, int64_t all) { return std::min(2 * count + 32, all); }

const char* why_not(const Tensor& x, const Tensor& W_enc, int64_t count, cudaStream_t stream) {
  if (const char* why = why_not_now(x, W_enc, stream)) return why;
  if (screening_is("always")) return nullptr;
  if (x.size(0) <= kFewRows) return "there are few tokens";
  // The int8 products take half the time of the plain one, and the pre-activations may take the other half.
  const int64_t all = x.size(0) * W_enc.size(1), most = all / (2 * kElementsPerCandidate);
  return room_of(count, all) > most ? "d_sae is small for this k" : nullptr;
}

struct Screen {
  UpperBounds uppers;
  BatchBest kept;         // by what pre can be at most
  ScreenedHeader header;  // known after the first scan, as is `bounds`
  float bounds;           // of the tokens, their sum: NaN where one has no codes
  int64_t decided = 0;    // pre-activations

  Screen(const Call& call, int64_t count, const Tensor& bytes)
      : uppers(call.op, call.x, call.bias, call.packed, bytes, call.stream),
        kept(call.bias, call.n, call.d_sae, room_of(count, call.n * call.d_sae)) {}
};

// Returns what is being read, for as long as that takes.
Tensor read_codes(const Call& call, Screen& screen, Readback& found) {
  const int64_t first = 0;
  const torch::headeronly::IntHeaderOnlyArrayRef tokens(&first, 1);
  const Tensor sum =
      torch::stable::sum(screen.uppers.given.bound, tokens, false, ScalarType::Float);
  found.read(&screen.header, call.packed.header(), sizeof(screen.header));
  found.read(&screen.bounds, sum.data_ptr(), sizeof(screen.bounds));
  return sum;
}

// The largest uppers of the batch, of those above `least`. Waits for the device.
BatchSeen collect(const Call& call, Screen& screen, float least) {
  const BatchCandidates candidates = [&](int64_t begin, const Tensor& bound, Prefix chunk,
                                         int64_t capacity) {
    return screen.uppers.candidates(call.op, begin, bound, chunk, capacity, call.stream);
  };
  screen.kept.forget();
  if (least > 0) {
    scan_above(call.op, screen.kept, least, candidates, call.stream);
  } else {
    scan_prefixes(call.op, screen.kept, candidates, call.stream);
  }
  Readback found(call.op, call.stream);
  const Tensor held = read_codes(call, screen, found);
  const BatchSeen seen = look(screen.kept, found);
  check_header(call.op, call.packed, screen.header);
  const bool again = least == 0 && !seen.whole;
  if (!again) return seen;
  scan_lost(call.op, screen.kept, seen.lost, candidates, call.stream);
  return look(call.op, screen.kept, call.stream);
}

// The best of the entries whose uppers were kept, by their pre-activations. Waits for the device.
BatchSeen decide(const Call& call, Screen& screen, int64_t entries, BatchBest& best) {
  BatchCsr& kept = screen.kept.kept;
  EncodeCsr csr;
  csr.offsets = kept.offsets;
  csr.indices = kept.latents;
  csr.values = kept.values;
  csr.needed = torch::stable::narrow(kept.offsets, 0, call.n, 1);
  rescore(call.op, call.x, call.W_enc, call.bias, csr, entries, call.stream);
  screen.decided += entries;
  best.forget();
  merge(call.op, best, 0, csr, 0, call.stream);
  return look(call.op, best, call.stream);
}

enum class Outcome { kSure, kWrongGuess, kUndecided, kNoCodes };

// `least` is 0 without a guess; entries: of the result.
Outcome select(const Call& call, Screen& screen, float least, BatchBest& best, int64_t& entries) {
  const BatchSeen kept = collect(call, screen, least);
  if (std::isnan(screen.bounds)) return Outcome::kNoCodes;
  if (!kept.whole) return Outcome::kWrongGuess;
  const BatchSeen chosen = decide(call, screen, kept.entries, best);
  entries = chosen.entries;
  if (least > 0 && chosen.threshold <= least) return Outcome::kWrongGuess;
  // What was left out is not above `most`; 0: not above `least`. Of bounds that are NaN those that come first were kept.
  const bool all = screen.kept.room == call.n * call.d_sae;
  const float most = all ? 0.0f : kept.threshold;
  const bool sure = most == 0 || chosen.threshold > most || std::isnan(chosen.threshold);
  return sure ? Outcome::kSure : Outcome::kUndecided;
}

}  // namespace

std::optional<int64_t> batchtopk_screened(const char* op, const Tensor& x, const Tensor& W_enc,
                                          const Tensor& bias, std::optional<float> least,
                                          const Tensor& bytes, BatchBest& best,
                                          cudaStream_t stream) {
  if (const char* why = why_not(x, W_enc, best.count, stream)) {
    report_screened(op, x, W_enc, why, {}, 0);
    return std::nullopt;
  }
  const Call call = {op, stream, x, W_enc, bias, screened_encoder(op, bytes, W_enc)};
  Screen screen(call, best.count, bytes);
  int64_t entries = 0;
  Outcome found = select(call, screen, least.value_or(0.0f), best, entries);
  if (found == Outcome::kWrongGuess) found = select(call, screen, 0.0f, best, entries);
  const char* why = found == Outcome::kSure      ? nullptr
                    : found == Outcome::kNoCodes ? "a token has no int8 codes"
                                                 : "int8 codes leave the selection undecided";
  report_screened(op, x, W_enc, why, screen.header, screen.decided);
  if (why == nullptr) return entries;
  best.forget();
  return std::nullopt;
}

}  // namespace on_cuda
}  // namespace gemmascope_fast
