#include "cpu_isa.h"

#include <atomic>

#include "torch_api.h"

namespace pyobserver {
namespace {

bool supported(CpuIsa isa) {
#if defined(PYOBS_X86_KERNELS)
  switch (isa) {
    case CpuIsa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case CpuIsa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    default:
      return true;
  }
#else
  return isa == CpuIsa::baseline;
#endif
}

CpuIsa best() {
  for (CpuIsa isa : {CpuIsa::avx512, CpuIsa::avx2}) {
    if (supported(isa)) {
      return isa;
    }
  }
  return CpuIsa::baseline;
}

std::atomic<CpuIsa> active{best()};

}  // namespace

CpuIsa active_cpu_isa() { return active.load(std::memory_order_relaxed); }

}  // namespace pyobserver

using pyobserver::CpuIsa;

const char* pyobserver_cpu_isa_name(int isa) {
  constexpr const char* names[pyobserver::kCpuIsaCount] = {"baseline", "avx2", "avx512"};
  return names[isa];
}

bool pyobserver_cpu_isa_supported(int isa) {
  return pyobserver::supported(static_cast<CpuIsa>(isa));
}

int pyobserver_cpu_isa_active() { return static_cast<int>(pyobserver::active_cpu_isa()); }

bool pyobserver_cpu_isa_force(int isa) {
  if (!pyobserver_cpu_isa_supported(isa)) {
    return false;
  }
  pyobserver::active.store(static_cast<CpuIsa>(isa), std::memory_order_relaxed);
  return true;
}

int pyobserver_num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }
