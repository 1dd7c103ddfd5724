// Where the shared variables of kernels are, for cuda_fibers.cpp.
#pragma once

#include <link.h>
#include <string.h>

#include <stdexcept>
#include <vector>

namespace cuda_on_cpu {

constexpr int kUnwritten = 0xFF;  // each byte of shared memory when a block begins: NaN

// The thread_local variables of this library, as the calling thread has them: the shared variables of kernels are among
// them. All have their values again when it is destroyed.
class ThreadLocals {
 public:
  ThreadLocals() {
    dl_iterate_phdr(&ThreadLocals::find, this);
    if (begin_ == nullptr)
      throw std::runtime_error("the library's thread-local memory is not found");
    saved_.assign(begin_, begin_ + size_);
  }
  ~ThreadLocals() { memcpy(begin_, saved_.data(), size_); }
  void fill() { memset(begin_, kUnwritten, size_); }

 private:
  static int find(dl_phdr_info* info, size_t, void* self) {
    static thread_local volatile char one_of_them = 0;
    one_of_them = 0;
    const char* wanted = const_cast<const char*>(&one_of_them);
    char* data = static_cast<char*>(info->dlpi_tls_data);
    for (int i = 0; i < info->dlpi_phnum && data != nullptr; ++i) {
      const auto& header = info->dlpi_phdr[i];
      if (header.p_type == PT_TLS && wanted >= data && wanted < data + header.p_memsz) {
        static_cast<ThreadLocals*>(self)->begin_ = data;
        static_cast<ThreadLocals*>(self)->size_ = header.p_memsz;
      }
    }
    return 0;
  }
  char* begin_ = nullptr;
  size_t size_ = 0;
  std::vector<char> saved_;
};

}  // namespace cuda_on_cpu
