// Calls of an op of another namespace through torch's dispatcher.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <tuple>

namespace gemmascope_fast {

template <class T>
struct Outputs {
  static constexpr size_t kCount = 1;
  static T take(StableIValue* stack) { return torch::stable::detail::to<T>(stack[0]); }
};

template <class... T>
struct Outputs<std::tuple<T...>> {
  static constexpr size_t kCount = sizeof...(T);
  static std::tuple<T...> take(StableIValue* stack) {
    return torch::stable::detail::unbox_to_tuple<T...>(stack);
  }
};

template <>
struct Outputs<void> {
  static constexpr size_t kCount = 0;
  static void take(StableIValue*) {}
};

template <class T>
struct Same {
  using type = T;
};

// The result of op `name` ("namespace::op"), which has the schema of the kernel in front: arguments are converted to
// its types. Each is handed over as a new reference, which the dispatcher consumes; outputs come back on the same
// stack.
template <class Result, class... Args>
Result call_op(Result (*)(Args...), const char* name, typename Same<Args>::type... args) {
  std::array<StableIValue, std::max(sizeof...(Args), Outputs<Result>::kCount)> stack{
      torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return Outputs<Result>::take(stack.data());
}

}  // namespace gemmascope_fast
