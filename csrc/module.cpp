// pyobserver._C: what was built, and which instruction set the CPU kernels use.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "core/cpu_isa.h"

namespace py = pybind11;

namespace {

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (int isa = 0; isa < pyobserver::kCpuIsaCount; ++isa) {
    if (pyobserver_cpu_isa_supported(isa)) {
      names.emplace_back(pyobserver_cpu_isa_name(isa));
    }
  }
  return names;
}

void set_cpu_isa(const std::string& name) {
  std::string known;
  for (int isa = 0; isa < pyobserver::kCpuIsaCount; ++isa) {
    if (name == pyobserver_cpu_isa_name(isa) && pyobserver_cpu_isa_force(isa)) {
      return;
    }
    if (pyobserver_cpu_isa_supported(isa)) {
      known += std::string(known.empty() ? "" : ", ") + pyobserver_cpu_isa_name(isa);
    }
  }
  throw py::value_error("name: expected an instruction set of this machine and build (" + known +
                        "), got '" + name + "'");
}

std::map<std::string, std::string> build_info() {
  return {
      {"version", PYOBSERVER_VERSION},           {"compiler", PYOBSERVER_COMPILER},
      {"torch_target", PYOBSERVER_TORCH_TARGET}, {"build_torch", PYOBSERVER_BUILD_TORCH},
      {"cuda", PYOBSERVER_CUDA_BUILD},           {"build_type", PYOBSERVER_BUILD_TYPE},
  };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and the CPU instruction set of pyobserver's kernels.";
  m.def("build_info", &build_info,
        "Versions, compiler and build type; 'cuda' is the toolkit's version and the architectures, "
        "or 'no' and why.");
  m.def("cpu_isas", &cpu_isas, "Instruction sets that this build and this machine both have.");
  m.def(
      "cpu_isa", [] { return pyobserver_cpu_isa_name(pyobserver_cpu_isa_active()); },
      "The instruction set in use.");
  m.def("set_cpu_isa", &set_cpu_isa, py::arg("name"),
        "Use another instruction set from the next call on.\n\n"
        "Raises ValueError for one that this build or machine does not have.");
  m.def("num_threads", &pyobserver_num_threads, "Threads of torch's pool, which the kernels use.");
}
