// Ceilings that no library offers: random rows of memory, and fused multiply-adds on registers.
//
//   random_rows   sum over e of all 64-byte lines of row indices[e]; row_bytes is a multiple of 64
//   multiply_add  rounds x 12 chains of 16 floats, a <- a b + c: 384 floating-point operations a round
//
// Rows: eight in flight, prefetched `ahead` rows before use; bound by DRAM and page walks, the additions hide behind them.
// Chains: 2 ports x 4 cycles of latency need 8, the others hide what the compiler adds.
#include <stdint.h>

typedef float Line __attribute__((vector_size(64), aligned(4)));
enum { kRows = 8, kChains = 12 };

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

float multiply_add(int64_t rounds, float factor, float addend) {
  Line acc[kChains];
  const Line b = factor - (Line){0}, c = addend - (Line){0};
  for (int i = 0; i < kChains; ++i) acc[i] = b + (float)i;
  for (int64_t r = 0; r < rounds; ++r) {
    for (int i = 0; i < kChains; ++i) acc[i] = acc[i] * b + c;
  }
  float total = 0;
  for (int i = 0; i < kChains; ++i) total += acc[i][0] + acc[i][15];
  return total;
}
