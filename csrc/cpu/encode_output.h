// What every encoder returns besides its offsets, allocated with the padding beyond the entries
// zeroed.
#pragma once

#include <algorithm>
#include <tuple>

#include "common/check.h"
#include "cpu/by_feature.h"
#include "cpu/memory.h"

namespace gemmascope_fast {

struct EncodeOutput {
  Tensor indices, values, gate;

  // Entries [0, used) are the caller's to write.
  EncodeOutput(const Tensor& like, int64_t capacity, int64_t used)
      : indices(new_tensor(like, {capacity}, ScalarType::Int)),
        values(new_tensor(like, {capacity}, ScalarType::Float)),
        gate(new_tensor(like, {capacity}, ScalarType::Float)) {
    std::fill(indices_data() + used, indices_data() + capacity, 0);
    std::fill(values_data() + used, values_data() + capacity, 0.0f);
    std::fill(gate_data() + used, gate_data() + capacity, 0.0f);
  }

  int32_t* indices_data() const { return static_cast<int32_t*>(indices.data_ptr()); }
  float* values_data() const { return static_cast<float*>(values.data_ptr()); }
  float* gate_data() const { return static_cast<float*>(gate.data_ptr()); }
};

inline Tensor int64_scalar(const Tensor& like, int64_t value) {
  Tensor t = new_tensor(like, {}, ScalarType::Long);
  *static_cast<int64_t*>(t.data_ptr()) = value;
  return t;
}

inline Tensor float_scalar(const Tensor& like, float value) {
  Tensor t = new_tensor(like, {}, ScalarType::Float);
  *static_cast<float*>(t.data_ptr()) = value;
  return t;
}

// feature_offsets and permutation, or two empty tensors when they were not asked for.
inline std::tuple<Tensor, Tensor> feature_view(bool wanted, const Tensor& like,
                                               const Tensor& offsets, const Tensor& indices,
                                               int64_t d_sae) {
  if (wanted) return by_feature_cpu(offsets, indices, d_sae);
  return {new_tensor(like, {0}, ScalarType::Long), new_tensor(like, {0}, ScalarType::Long)};
}

}  // namespace gemmascope_fast
