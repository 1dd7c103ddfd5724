// The entries of a range of tokens, reordered so that W is read one range of latents after the other.
//
//   run    entries [first, first + count) of one token, all in one range of 2^shift latents
//   order  by range, then by token: every token still meets its entries in stored order
//
// A range's rows that several tokens use are read from DRAM once, the other tokens find them in the L3 cache, and they lie
// on fewer pages. A token's accumulator is read and written once per run instead of once per token. Entries whose latents
// do not ascend stay in the range of the latent before them, so any order is preserved.
#pragma once

#include <vector>

#include "cpu/entries.h"

namespace gemmascope_fast {

struct TokenRun {
  int64_t row, first, count;
};

struct TokenRuns {
  std::vector<TokenRun> runs;
  std::vector<int32_t> indices;  // of all runs, one after the other
};

// Shift of the ranges, or -1 where reordering does not pay: few entries per token, or few rows that are used twice.
// Measured on two Zen 4 cores at d_sae = 65,536, d = 1152, 64 uniform entries per token: at n = 1024 16 ranges take 9.1 ms
// where token by token takes 11.8; at n = 256 (an entry for every fourth latent) any number of ranges takes as long.
int range_shift(const Entries& entries, int64_t row_bytes);

TokenRuns token_runs(const Entries& entries, int64_t begin, int64_t end, int shift);

}  // namespace gemmascope_fast
