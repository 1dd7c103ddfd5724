// What kernels of compute capability 9.0a need from a device: their code, shared memory, and maps for tensor copies.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <optional>
#include <vector>

#include "common/matrix.h"

namespace gemmascope_fast {

struct Sm90Device {
  bool serves = false;
  int processors = 0;
  decltype(&cuTensorMapEncodeTiled) encode_map = nullptr;
};

// What the devices of this process answered, for some kernels that take as much dynamic shared memory.
class Sm90Devices {
 public:
  Sm90Devices(std::vector<const void*> kernels, int shared_bytes)
      : kernels_(std::move(kernels)), shared_bytes_(shared_bytes) {}

  // The current one. What it answered is kept; a question that failed is asked again at the next call, and its error is
  // none of the launches to come.
  Sm90Device current();

 private:
  std::optional<Sm90Device> ask(int device) const;
  std::optional<bool> prepare(const void* kernel) const;

  const std::vector<const void*> kernels_;
  const int shared_bytes_;
  std::mutex mutex_;
  std::map<int, Sm90Device> known_;
};

// Elements of a matrix that is copied in boxes of 128 bytes per row.
struct Sm90Element {
  CUtensorMapDataType type;
  int64_t bytes;
  int64_t line() const { return 16 / bytes; }  // elements between which rows may begin
};

bool sm90_rows_fit(const Sm90Element& element, const void* data, int64_t rows, int64_t d,
                   int64_t stride);

// Boxes of 128 bytes x box_rows under the 128-byte swizzle; false where the driver refuses.
bool sm90_map(const Sm90Device& device, CUtensorMap* map, const Sm90Element& element,
              const void* data, int64_t rows, int64_t d, int64_t stride, int box_rows);

}  // namespace gemmascope_fast
