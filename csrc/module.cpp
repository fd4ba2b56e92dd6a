// memtl._C: what Python asks of the native code itself. The operators are registered with torch by
// the files of their families, linked in beside this one; no tensor passes here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "common/isa.h"

namespace py = pybind11;

namespace {

constexpr memtl::Isa kIsas[] = {memtl::Isa::portable, memtl::Isa::avx2, memtl::Isa::avx512};

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (memtl::Isa each : kIsas) {
    if (memtl::available(each)) names.emplace_back(memtl::name(each));
  }
  return names;
}

py::dict build_info() {
  std::vector<std::string> built = {"portable"};
  MEMTL_IF_AVX2(built.emplace_back("avx2");)
  MEMTL_IF_AVX512(built.emplace_back("avx512");)
  py::dict info;
  info["version"] = MEMTL_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["flags"] = MEMTL_FLAGS;
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["torch"] = MEMTL_TORCH;
  info["torch_target_version"] = py::int_(static_cast<unsigned long long>(TORCH_TARGET_VERSION));
  info["isas"] = built;
  return info;
}

uint32_t num_threads() {
  uint32_t threads = 0;
  if (torch_get_num_threads(&threads) != 0)
    throw std::runtime_error("torch_get_num_threads failed");
  return threads;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native CPU kernels of memtl: how they were built, and the instruction set in use.";
  try {
    memtl::isa();
  } catch (const std::invalid_argument& error) {
    throw py::import_error(error.what());
  }
  m.def("build_info", &build_info,
        "Version, compiler, flags, C++ standard, torch built against, instruction sets built.");
  m.def("isa", [] { return memtl::name(memtl::isa()); }, "The instruction set in use.");
  m.def("isas", &isas, "The instruction sets this machine can run, the plainest first.");
  m.def(
      "set_isa", [](const std::string& name) { memtl::set_isa(memtl::parse_isa(name.c_str())); },
      py::arg("name"), "Use this instruction set; ValueError where it cannot be used.");
  m.def("num_threads", &num_threads, "Threads a kernel may use: torch.get_num_threads().");
}
