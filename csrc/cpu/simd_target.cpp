#include "cpu/simd_target.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace gemmascope_fast {

#if defined(__x86_64__)
// By CPUID what not every compiler that can assemble the instructions knows by name: F16C (Clang 14), AVX-VNNI (GCC 10).
static bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx >> 29 & 1) != 0;
}
#endif

bool has_avx_vnni() {
#if defined(__x86_64__) && GSF_AVX_VNNI
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 4 & 1) != 0;
#else
  return false;
#endif
}

bool has_avx512_vnni() {
#if defined(__x86_64__)
  return (__builtin_cpu_supports("avx512vnni") != 0) && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

bool has_amx() {
#if defined(__x86_64__) && defined(__linux__) && GSF_AMX
  static const bool found = [] {
    constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25, kSaved = 1u << 27;
    constexpr unsigned kTileState = 3u << 17;          // of XCR0: configuration and data
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
    if ((edx & kTile) == 0 || (edx & kInt8) == 0) return false;
    if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0 || (ecx & kSaved) == 0) return false;
    unsigned low = 0, high = 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & kTileState) == kTileState && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return found;
#else
  return false;
#endif
}

// FEAT_DotProd, which Armv8.2 has as an option and every Armv8.4 processor.
bool has_sdot() {
#if defined(__aarch64__) && defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(__aarch64__) && defined(__APPLE__)
  int found = 0;
  size_t size = sizeof(found);
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &found, &size, nullptr, 0) == 0 && found != 0;
#else
  return false;
#endif
}

bool simd_target_available(SimdTarget target) {
  switch (target) {
    case SimdTarget::kGeneric:
      return true;
#if defined(__x86_64__)
    case SimdTarget::kAvx2:
      return (__builtin_cpu_supports("avx2") != 0) && __builtin_cpu_supports("fma") && has_f16c();
    case SimdTarget::kAvx2Vnni:
      return simd_target_available(SimdTarget::kAvx2) && (has_avx_vnni() || has_avx512_vnni());
    case SimdTarget::kAvx512:
      return simd_target_available(SimdTarget::kAvx2) && (__builtin_cpu_supports("avx512f") != 0) &&
             (__builtin_cpu_supports("avx512bw") != 0) && __builtin_cpu_supports("avx512vl") &&
             (__builtin_cpu_supports("avx512dq") != 0);
    case SimdTarget::kAvx512Amx:
      return simd_target_available(SimdTarget::kAvx512) && has_avx512_vnni() && has_amx();
#endif
#if defined(__aarch64__)
    case SimdTarget::kNeon:
      return true;  // part of the architecture
#endif
    default:
      return false;
  }
}

const char* simd_target_name(SimdTarget target) {
  switch (target) {
    case SimdTarget::kAvx2:
      return "avx2";
    case SimdTarget::kAvx2Vnni:
      return "avx2_vnni";
    case SimdTarget::kAvx512:
      return "avx512";
    case SimdTarget::kAvx512Amx:
      return "avx512_amx";
    case SimdTarget::kNeon:
      return "neon";
    default:
      return "generic";
  }
}

static SimdTarget choose() {
  const SimdTarget all[] = {SimdTarget::kAvx512Amx, SimdTarget::kAvx512, SimdTarget::kAvx2Vnni,
                            SimdTarget::kAvx2,      SimdTarget::kNeon,   SimdTarget::kGeneric};
  const char* wanted = std::getenv("GEMMASCOPE_FAST_CPU");
  for (SimdTarget target : all) {
    if (wanted != nullptr && *wanted != '\0') {
      if (std::string(wanted) != simd_target_name(target)) continue;
      if (simd_target_available(target)) return target;
      throw std::runtime_error(std::string("GEMMASCOPE_FAST_CPU=") + wanted +
                               ": this processor or build does not have it");
    }
    if (simd_target_available(target)) return target;
  }
  throw std::runtime_error(std::string("GEMMASCOPE_FAST_CPU=") + wanted +
                           ": expected generic, avx2, avx2_vnni, avx512, avx512_amx or neon");
}

SimdTarget simd_target() {
  static const SimdTarget target = choose();
  return target;
}

}  // namespace gemmascope_fast
