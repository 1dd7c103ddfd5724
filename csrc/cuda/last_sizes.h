// What the calls before found: room that an encoder can take before its host knows how much a call needs.
//
// A guess changes no bit of a result: strips whose records do not fit are computed again, entries are placed again
// where their room is too small, or much too large. So calls that differ in what decides about entries are told apart.
#pragma once

#include <stdint.h>

#include <array>
#include <mutex>

namespace gemmascope_fast {

class LastSizes {
 public:
  struct Call {
    const void* weights;
    int64_t n, d_sae;
    float window;  // half the bandwidth
    bool operator==(const Call& other) const {
      return weights == other.weights && n == other.n && d_sae == other.d_sae &&
             window == other.window;
    }
  };

  struct Sizes {
    int64_t records;  // of all strips
    int64_t entries;
  };

  // Room for 1/32 more than the last such call found; 0 where it found none, there was none, or others took its place.
  Sizes room(const Call& call) {
    const std::lock_guard<std::mutex> lock(in_use_);
    const Kept& kept = kept_of(call);
    if (!(kept.call == call)) return {0, 0};
    return {more(kept.sizes.records), more(kept.sizes.entries)};
  }
  void keep(const Call& call, const Sizes& sizes) {
    const std::lock_guard<std::mutex> lock(in_use_);
    kept_of(call) = {call, sizes};
  }
  // Whether a result of so many entries leaves at most an eighth of its room unused.
  static bool fits(int64_t entries, int64_t room) {
    return entries <= room && room - entries <= entries / 8 + 64;
  }

 private:
  struct Kept {
    Call call;
    Sizes sizes;
  };
  static int64_t more(int64_t found) { return found > 0 ? found + found / 32 + 64 : 0; }
  Kept& kept_of(const Call& call) {
    const uint64_t mixed = (reinterpret_cast<uintptr_t>(call.weights) / 16 +
                            2 * static_cast<uint64_t>(call.n) + (call.window > 0.0f)) *
                           0x9e3779b97f4a7c15u;
    return kept_[mixed >> 58];
  }
  std::mutex in_use_;
  std::array<Kept, 64> kept_ = {};
};

}  // namespace gemmascope_fast
