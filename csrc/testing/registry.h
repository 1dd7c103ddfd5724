// Bindings of the other files of csrc/testing: each adds its own to the module.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace gemmascope_fast {

using Bind = void (*)(pybind11::module_&);

inline std::vector<Bind>& bindings() {
  static std::vector<Bind> all;
  return all;
}

// At namespace scope: const BindLater later([](pybind11::module_& m) { m.def(...); });
struct BindLater {
  explicit BindLater(Bind bind) { bindings().push_back(bind); }
};

}  // namespace gemmascope_fast
