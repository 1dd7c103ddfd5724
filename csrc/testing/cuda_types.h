// CUDA's vector types and 16-bit floats for cuda_on_cpu.h, with the operations that device code here uses. The 16-bit
// types convert where they are told to and have no arithmetic: on a GPU it would round after each operation.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#define CUDA_ON_CPU_VECTORS(base, scalar, a2, a4)                                   \
  struct alignas(a2) base##2 { scalar x, y; };                                      \
  struct base##3 { scalar x, y, z; };                                               \
  struct alignas(a4) base##4 { scalar x, y, z, w; };                                \
  inline base##2 make_##base##2(scalar x, scalar y) { return {x, y}; }              \
  inline base##3 make_##base##3(scalar x, scalar y, scalar z) { return {x, y, z}; } \
  inline base##4 make_##base##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }

CUDA_ON_CPU_VECTORS(char, signed char, 2, 4)
CUDA_ON_CPU_VECTORS(uchar, unsigned char, 2, 4)
CUDA_ON_CPU_VECTORS(short, short, 4, 8)
CUDA_ON_CPU_VECTORS(ushort, unsigned short, 4, 8)
CUDA_ON_CPU_VECTORS(int, int, 8, 16)
CUDA_ON_CPU_VECTORS(uint, unsigned, 8, 16)
CUDA_ON_CPU_VECTORS(longlong, long long, 16, 16)
CUDA_ON_CPU_VECTORS(ulonglong, unsigned long long, 16, 16)
CUDA_ON_CPU_VECTORS(float, float, 8, 16)
CUDA_ON_CPU_VECTORS(double, double, 16, 16)
#undef CUDA_ON_CPU_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_on_cpu {

template <class To, class From>
To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

inline uint16_t bfloat16_of(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float of_bfloat16(uint16_t bits) {
  return bits_as<float>(static_cast<uint32_t>(bits) << 16);
}

inline uint16_t half_of(float value) {
  const uint32_t bits = bits_as<uint32_t>(value), magnitude = bits & 0x7fffffff;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  if (value != value) return 0x7fff;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and more
  if (magnitude < 0x38800000) {                       // subnormal: a multiple of 2^-24
    return static_cast<uint16_t>(sign | static_cast<int>(nearbyintf(fabsf(value) * 16777216.0f)));
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000;
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

inline float of_half(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent == 0) {
    return bits_as<float>(sign | bits_as<uint32_t>(static_cast<float>(fraction) / 16777216.0f));
  }
  return bits_as<float>(sign | ((exponent == 31 ? 255 : exponent + 112) << 23) | (fraction << 13));
}

}  // namespace cuda_on_cpu

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) : bits(cuda_on_cpu::bfloat16_of(value)) {}
  explicit operator float() const { return cuda_on_cpu::of_bfloat16(bits); }
};

struct __half {
  uint16_t bits;
  __half() = default;
  explicit __half(float value) : bits(cuda_on_cpu::half_of(value)) {}
  explicit operator float() const { return cuda_on_cpu::of_half(bits); }
};

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
  __half x, y;
};
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;
using half = __half;
using half2 = __half2;

inline float __bfloat162float(__nv_bfloat16 v) { return static_cast<float>(v); }
inline float __low2float(__nv_bfloat162 v) { return static_cast<float>(v.x); }
inline float __high2float(__nv_bfloat162 v) { return static_cast<float>(v.y); }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__low2float(v), __high2float(v)}; }
inline __nv_bfloat16 __float2bfloat16(float v) { return __nv_bfloat16(v); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return __nv_bfloat16(v); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__nv_bfloat16(x), __nv_bfloat16(y)};
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return __floats2bfloat162_rn(v.x, v.y); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short v) {
  return cuda_on_cpu::bits_as<__nv_bfloat16>(v);
}

inline float __half2float(__half v) { return static_cast<float>(v); }
inline float __low2float(__half2 v) { return static_cast<float>(v.x); }
inline float __high2float(__half2 v) { return static_cast<float>(v.y); }
inline float2 __half22float2(__half2 v) { return {__low2float(v), __high2float(v)}; }
inline __half __float2half(float v) { return __half(v); }
inline __half __float2half_rn(float v) { return __half(v); }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }
inline unsigned short __half_as_ushort(__half v) { return v.bits; }
inline __half __ushort_as_half(unsigned short v) { return cuda_on_cpu::bits_as<__half>(v); }
