// The ceiling of every sparse pass: random rows of memory, summed, eight in flight, prefetched `ahead` rows before use.
//
//   sum over e of all 64-byte lines of row indices[e]; row_bytes is a multiple of 64
//
// Bound by DRAM and page walks; the additions hide behind them.
#include <stdint.h>

typedef float Line __attribute__((vector_size(64), aligned(4)));
enum { kRows = 8 };

float random_rows(const char* base, const int32_t* indices, int64_t count, int64_t row_bytes,
                  int64_t ahead) {
  Line sum[kRows] = {0};
  for (int64_t e = 0; e + kRows <= count; e += kRows) {
    const char *row[kRows], *next[kRows];
    for (int i = 0; i < kRows; ++i) {
      const int64_t then = e + i + ahead < count ? e + i + ahead : e + i;
      row[i] = base + indices[e + i] * row_bytes;
      next[i] = base + indices[then] * row_bytes;
    }
    for (int64_t k = 0; k < row_bytes; k += 64) {
      for (int i = 0; i < kRows; ++i) {
        __builtin_prefetch(next[i] + k, 0, 2);
        sum[i] += *(const Line*)(row[i] + k);
      }
    }
  }
  float total = 0;
  for (int i = 0; i < kRows; ++i) total += sum[i][0] + sum[i][15];
  return total;
}
