// Which instruction set the CPU kernels use. Each kernel source is compiled once per set, with
// PYOBS_ISA naming the namespace it fills; every op picks its table of kernels here at each call.
#pragma once

namespace pyobserver {

enum class CpuIsa { baseline, avx2, avx512 };
constexpr int kCpuIsaCount = 3;

// The set in use: the best one of this machine until another is forced.
CpuIsa active_cpu_isa();

// Tables of kernels, filled per set. PYOBS_KERNEL_TABLE(Table, name) declares them and
// name(), which gives the one in use.
#if defined(PYOBS_X86_KERNELS)
#define PYOBS_KERNEL_TABLE(Table, name) \
  namespace baseline {                  \
  extern const Table name;              \
  }                                     \
  namespace avx2 {                      \
  extern const Table name;              \
  }                                     \
  namespace avx512 {                    \
  extern const Table name;              \
  }                                     \
  static inline const Table& name() {   \
    switch (active_cpu_isa()) {         \
      case CpuIsa::avx512:              \
        return avx512::name;            \
      case CpuIsa::avx2:                \
        return avx2::name;              \
      default:                          \
        return baseline::name;          \
    }                                   \
  }
#else
#define PYOBS_KERNEL_TABLE(Table, name) \
  namespace baseline {                  \
  extern const Table name;              \
  }                                     \
  static inline const Table& name() { return baseline::name; }
#endif

}  // namespace pyobserver

// For the pybind11 module, which lives in a library of its own. Names: "baseline", "avx2",
// "avx512". force returns false for a set that this build or machine does not have.
#define PYOBS_EXPORT __attribute__((visibility("default")))
extern "C" {
PYOBS_EXPORT const char* pyobserver_cpu_isa_name(int isa);
PYOBS_EXPORT bool pyobserver_cpu_isa_supported(int isa);
PYOBS_EXPORT int pyobserver_cpu_isa_active();
PYOBS_EXPORT bool pyobserver_cpu_isa_force(int isa);
PYOBS_EXPORT int pyobserver_num_threads();
}
