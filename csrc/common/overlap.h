// What an op that writes an argument in place refuses: memory that overlaps itself, or that it also reads.
#pragma once

#include "common/check.h"

namespace gemmascope_fast {

// Two elements of `t`, a matrix, in one place would make a sum depend on the order of the writes.
inline void check_distinct_elements(const char* op, const char* name, const Tensor& t) {
  int64_t inner = t.stride(0) < t.stride(1) ? 0 : 1;
  if (t.size(inner) <= 1) inner = 1 - inner;
  const int64_t outer = 1 - inner;
  if (t.size(inner) <= 1 || t.size(outer) == 0) return;
  const bool distinct = t.stride(inner) > 0 &&
                        (t.size(outer) == 1 || t.stride(outer) >= t.size(inner) * t.stride(inner));
  if (distinct) return;
  fail(op, name, " must not overlap itself, got shape ", shape_of(t), " and strides [", t.stride(0),
       ", ", t.stride(1), "]; pass ", name, ".clone()");
}

struct Bytes {
  uintptr_t begin, end;
};

inline Bytes bytes_between(const Tensor& t) {
  const auto begin = reinterpret_cast<uintptr_t>(t.data_ptr());
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (t.size(i) == 0) return {begin, begin};
    last += (t.size(i) - 1) * t.stride(i);
  }
  return {begin, begin + static_cast<uintptr_t>(last + 1) * t.element_size()};
}

// By the addresses from first to last element: columns of one matrix that lie between each other's are refused, too.
inline void check_separate(const char* op, const char* name, const Tensor& written,
                           const char* read_name, const Tensor& read) {
  const Bytes a = bytes_between(written), b = bytes_between(read);
  if (a.begin == a.end || b.begin == b.end || a.end <= b.begin || b.end <= a.begin) return;
  fail(op, name, " shares memory with ", read_name, ", which is read while ", name,
       " is written; pass ", read_name, ".clone()");
}

}  // namespace gemmascope_fast
