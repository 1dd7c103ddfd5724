#include "cuda/dense_products.h"

#include <cuda_runtime_api.h>

#include <mutex>

#include "cuda/runtime.h"

namespace gemmascope_fast {
namespace {

constexpr const char* kOp = "set_rates";

std::mutex mutex;
std::vector<DenseRates> table;  // empty: nothing to hand over to

double architecture_of(int device) {
  int major = 0, minor = 0;
  check_cuda(kOp, "device attributes",
             cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check_cuda(kOp, "device attributes",
             cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return 10 * major + minor;
}

}  // namespace

bool dense_pays(const Tensor& t, const std::vector<DenseWork>& works) {
  DenseRates rates;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (table.empty()) return false;
    rates = rates_of(table, architecture_of(t.get_device_index()));
  }
  return dense_pays(rates, works);
}

// Rows of six numbers, as DenseRates; none: never again.
void set_rates(std::vector<double> rates) {
  std::vector<DenseRates> rows;
  if (!rates.empty()) rows = rates_table(rates);
  const std::lock_guard<std::mutex> lock(mutex);
  table = rows;
}

STABLE_TORCH_LIBRARY(gemmascope_fast_triton, m) { m.def("set_rates(float[] rates) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(gemmascope_fast_triton, CompositeExplicitAutograd, m) {
  m.impl("set_rates", TORCH_BOX(&set_rates));
}

}  // namespace gemmascope_fast
