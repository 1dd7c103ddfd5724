// The tile that multiplies int8 codes and compares the products with a bound per entry.
//
//   P = sum over chunks of scale_i scale_j q . p, the dots exact in int32;
//   candidate unless  P <= base_j + limit_i slope_j - a_i alpha_j - b_i beta_j
//
// A header for each kind of instruction; the codes come from quantise.h.
#include "cpu/simd/screen.h"

#include "cpu/simd/quantise.h"
#if defined(__AVX512F__)
#include "cpu/simd/screen_avx512.h"
#if GSF_AMX
#include "cpu/simd/screen_amx.h"
#endif
#elif defined(__AVX2__)
#include "cpu/simd/screen_avx2.h"
#elif defined(GSF_NEON)
#include "cpu/simd/screen_neon.h"
#endif
#if defined(__AVX512F__) || !defined(__AVX2__)
#include "cpu/simd/screen_portable.h"
#endif

namespace gemmascope_fast {
namespace GSF_TARGET {

// Making the codes costs 1.4 cycles a weight in 512-bit registers and 2 in 256-bit ones, against n / 16 of the float32 product;
// on NEON about 6 vector instructions of which the float32 product takes n / 4, counted and not measured.
extern const ScreenTable kScreenTable, kVnniScreenTable, kVexScreenTable, kAmxScreenTable,
    kSdotScreenTable;

#if defined(__AVX512F__)
const ScreenTable kScreenTable = {false, 32, kLatentCode, quantise, tile, fine_dots};
const ScreenTable kVnniScreenTable = {true, 32, kLatentCode, quantise, tile_vnni, fine_dots_vnni};
#if GSF_AMX
const ScreenTable kAmxScreenTable = {true,
                                     32,
                                     kLatentCode,
                                     quantise,
                                     tile_amx,
                                     fine_dots_vnni,
                                     kGroupRows,
                                     codes_by_unit,
                                     begin_tiles,
                                     end_tiles,
                                     &kVnniScreenTable,
                                     true};
#endif
#elif defined(__AVX2__)
const ScreenTable kScreenTable = {true, 256, Pairs::kCode, quantise, tile<Pairs>, fine_dots<Pairs>};
const ScreenTable kVnniScreenTable = {true, 48, kLatentCode, quantise, tile<Evex>, fine_dots<Evex>};
#if GSF_AVX_VNNI
const ScreenTable kVexScreenTable = {true, 48, kLatentCode, quantise, tile<Vex>, fine_dots<Vex>};
#endif
#elif defined(GSF_NEON)
const ScreenTable kScreenTable = {false, 64, kLatentCode, quantise, tile, fine_dots};
const ScreenTable kSdotScreenTable = {true, 64, kLatentCode, quantise, tile_sdot, fine_dots_sdot};
#else
const ScreenTable kScreenTable = {false, 32, kLatentCode, quantise, tile, fine_dots};
#endif

}  // namespace GSF_TARGET
}  // namespace gemmascope_fast
