// The only way the CPU kernels use threads: torch's pool, so torch.set_num_threads governs us and
// nothing oversubscribes.
//
// Tasks are handed out by an atomic counter (dense rows cost more than empty ones). What a task
// computes may depend on its number alone, never on the slot or on the order: results are then the
// same for every thread count.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>

namespace gemmascope_fast {

// How many slots parallel_tasks(count, ...) uses at most: the size of an array of per-thread
// scratch.
inline int64_t parallel_slots(int64_t count) {
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  return std::max<int64_t>(1, std::min(threads, count));
}

// Calls body(task, slot) once for each task in [0, count); slot < slots says whose scratch to use:
// two calls running at the same time never have the same slot. The first exception stops the rest
// and is rethrown here, because one that leaves torch's parallel_for loses its text.
template <typename Body>
void parallel_tasks(int64_t count, int64_t slots, const Body& body) {
  if (count <= 0) return;
  if (slots <= 1 || count == 1) {
    for (int64_t task = 0; task < count; ++task) body(task, int64_t{0});
    return;
  }
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  // Inside another parallel region torch runs this inline: one call gets the whole range [0, slots)
  // and drains the counter by itself. A forked child hangs here, as in any parallel op of torch,
  // when its parent has used several threads; it works after torch.set_num_threads(1).
  torch::stable::parallel_for(0, slots, 1, [&](int64_t slot, int64_t) {
    try {
      for (int64_t task = next++; task < count; task = next++) body(task, slot);
    } catch (...) {
      next = count;
      std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

template <typename Body>
void parallel_tasks(int64_t count, const Body& body) {
  parallel_tasks(count, parallel_slots(count), body);
}

// Calls body(begin, end) over [0, count) in ranges of `grain`.
template <typename Body>
void parallel_ranges(int64_t count, int64_t grain, const Body& body) {
  parallel_tasks((count + grain - 1) / grain, [&](int64_t task, int64_t) {
    body(task * grain, std::min(count, (task + 1) * grain));
  });
}

}  // namespace gemmascope_fast
