// Tensors of the CPU ops, and what a caller sees when memory runs out: the op and, for a tensor, its bytes.
//
// Everything below an op throws std::bad_alloc, as the standard containers do; `reporting` adds the op's name where it
// enters the dispatcher.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <limits>
#include <new>

#include "common/check.h"

namespace gemmascope_fast {

class TensorTooLarge : public std::bad_alloc {
 public:
  explicit TensorTooLarge(int64_t bytes)
      : text_("not enough memory for a tensor of " + std::to_string(bytes) + " bytes") {}
  const char* what() const noexcept override { return text_.c_str(); }

 private:
  std::string text_;
};

// Bytes of `numel` elements, at most the largest int64.
inline int64_t bytes_of(int64_t numel, int64_t element_size) {
  int64_t bytes = 0;
  const bool overflow = __builtin_mul_overflow(numel, element_size, &bytes);
  return overflow ? std::numeric_limits<int64_t>::max() : bytes;
}

// allocate() with torch's allocator, whose own error does not get through the stable ABI.
template <typename Allocate>
Tensor try_tensor(int64_t numel, int64_t element_size, const Allocate& allocate) {
  try {
    return allocate();
  } catch (const std::exception&) {
    throw TensorTooLarge(bytes_of(numel, element_size));
  }
}

inline int64_t size_in_bytes(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Long:
      return 8;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    default:
      return 4;
  }
}

// By torch's C function: torch::stable::new_empty looks the operator up by its name, which takes 1 us more, and an encoder
// returns seven tensors.
inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes,
                         ScalarType dtype) {
  int64_t numel = 1;
  for (int64_t size : sizes) numel = bytes_of(numel, size);
  int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  return try_tensor(numel, size_in_bytes(dtype), [&] {
    AtenTensorHandle made = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.begin(),
                                                     static_cast<int64_t>(sizes.size()), &type,
                                                     nullptr, nullptr, 0, nullptr, &made));
    return Tensor(made);
  });
}

inline Tensor tensor_like(const Tensor& t) {
  return try_tensor(t.numel(), static_cast<int64_t>(t.element_size()),
                    [&] { return torch::stable::empty_like(t); });
}

inline Tensor contiguous_tensor(const Tensor& t) {
  if (t.is_contiguous()) return t;
  return try_tensor(t.numel(), static_cast<int64_t>(t.element_size()),
                    [&] { return torch::stable::contiguous(t); });
}

// The function to register for `op`: the same one, with its allocation failures reported.
template <const char* op, auto function>
struct Reporting;

template <const char* op, typename Result, typename... Args, Result (*function)(Args...)>
struct Reporting<op, function> {
  static Result call(Args... args) {
    try {
      return function(std::forward<Args>(args)...);
    } catch (const TensorTooLarge& error) {
      fail(op, error.what());
    } catch (const std::bad_alloc&) {
      fail(op, "not enough memory for the working memory of this call; pass fewer tokens at once");
    } catch (const std::length_error&) {
      fail(op, "not enough memory: the working memory of this call exceeds the address space");
    }
  }
};

}  // namespace gemmascope_fast

// m.impl for a function of the CPU; `op` is an array of characters with a name.
#define GSF_CPU_IMPL(m, op, function) \
  m.impl(op, TORCH_BOX((&gemmascope_fast::Reporting<op, &function>::call)))
