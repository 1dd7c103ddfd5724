// Argument checks shared by the host wrappers of every device. Messages name the op, the argument, what was expected
// and what came. One function per property.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace gemmascope_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] inline void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << op << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ']';
  return text.str();
}

inline void check_shape(const char* op, const char* name, const Tensor& t,
                        std::initializer_list<int64_t> expected) {
  bool same = t.dim() == static_cast<int64_t>(expected.size());
  int64_t i = 0;
  for (int64_t size : expected) same = same && t.size(i++) == size;
  if (same) return;
  std::ostringstream text;
  i = 0;
  for (int64_t size : expected) text << (i++ ? ", " : "") << size;
  fail(op, name, " must have shape [", text.str(), "], got ", shape_of(t));
}

inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim) {
  if (t.dim() != dim) fail(op, name, " must be ", dim, "-D, got shape ", shape_of(t));
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType expected) {
  if (t.scalar_type() != expected) {
    fail(op, name, " must be ", toString(expected), ", got ", toString(t.scalar_type()));
  }
}

// float32, bfloat16 or float16: what x, W_enc, W_dec and recon may be.
inline void check_float(const char* op, const char* name, ScalarType s) {
  if (s != ScalarType::Float && s != ScalarType::BFloat16 && s != ScalarType::Half) {
    fail(op, name, " must be float32, bfloat16 or float16, got ", toString(s));
  }
}

inline void check_float(const char* op, const char* name, const Tensor& t) {
  check_float(op, name, t.scalar_type());
}

}  // namespace gemmascope_fast
