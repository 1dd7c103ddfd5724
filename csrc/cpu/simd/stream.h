// A row written around the caches: half the traffic of stores, which read each line of 64 bytes before they change it.
//
// For memory larger than the caches that is written once. Lines that the row fills in part take ordinary stores. Included
// only by csrc/cpu/simd/*.cpp, like f16x.h.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#ifndef GSF_TARGET
#error "GSF_TARGET must name the target namespace (generic, avx2, avx512, neon)"
#endif

namespace gemmascope_fast {
namespace GSF_TARGET {

constexpr int64_t kLine = 64;

// One line, `to` on a line boundary.
static inline void stream_line(const char* from, char* to) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX__)
  for (int64_t i = 0; i < kLine; i += 32) {
    const __m256i part = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), part);
  }
#elif defined(__SSE2__)
  for (int64_t i = 0; i < kLine; i += 16) {
    const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), part);
  }
#else
  memcpy(to, from, kLine);
#endif
}

// src null: zeros.
static void stream(const void* src, int64_t bytes, void* dst) {
  static const char kZeros[kLine] = {};
  const char* from = static_cast<const char*>(src);
  char* to = static_cast<char*>(dst);
  const int64_t before = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(dst) % kLine);
  const int64_t head = before < bytes ? before : bytes;
  memcpy(to, from == nullptr ? kZeros : from, static_cast<size_t>(head));
  int64_t i = head;
  for (; i + kLine <= bytes; i += kLine) stream_line(from == nullptr ? kZeros : from + i, to + i);
  memcpy(to + i, from == nullptr ? kZeros : from + i, static_cast<size_t>(bytes - i));
}

// Streamed rows are visible to other threads, in order with later stores, from here on.
static void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace GSF_TARGET
}  // namespace gemmascope_fast
