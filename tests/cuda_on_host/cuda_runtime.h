// A CUDA device in software, for kernels compiled as C++: so that the .cu files run, and are tested
// bit for bit, on a machine without a GPU. Threads are fibers that take turns in an order drawn
// anew for each launch, so that a missing barrier shows; a few blocks are at work at once; shared
// memory begins as garbage. What one thread writes the others see at once, so a missing fence does
// not show.
//
// It stands in for the header of this name, and has what the kernels of this project use.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

// the kernels serve as those of CPU tensors, in a namespace of their own
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, k, m) \
  _STABLE_TORCH_LIBRARY_IMPL(ns##_cuda_on_host, CPU, m, C10_UID)

// and their device needs no guard
namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int32_t) {}
};
}  // namespace torch::stable::accelerator
#define DeviceGuard NoGuard

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// thread-local, so that the scheduler finds it, in templates too: they take no section
#define __shared__ static thread_local __attribute__((aligned(16)))
#define PYOBS_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(cuda_on_host::dynamic_shared())

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // one grid is run at a time

namespace cuda_on_host {

constexpr int kLanes = 32;

void* dynamic_shared();
// Blocks the calling thread until all of the block, or all lanes of the mask, have come.
int wait_for_block(bool vote);                                 // how many votes are yes
const uint64_t* wait_for_warp(uint32_t mask, uint64_t value);  // the values of the lanes
void let_others_run();  // now and then, before what other threads may see

// Runs a grid: body once for each thread.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* argument);
void count_memset();
void count_sync();
// Dynamic shared memory that a kernel may have: what its variables, which are taken for 4 KB, leave
// of 48 KB, or what was asked for.
size_t granted_to(const void* kernel);
void grant(const void* kernel, size_t bytes);

inline unsigned lane() { return threadIdx.x % kLanes; }

template <class T>
uint64_t to_word(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(value));
  return word;
}

template <class T>
T of_lane(uint32_t mask, T value, unsigned from) {
  const uint64_t* words = wait_for_warp(mask, to_word(value));
  T found;
  std::memcpy(&found, &words[from % kLanes], sizeof(found));
  return found;
}

}  // namespace cuda_on_host

// Barriers and warps. Blocks are one-dimensional.

inline void __syncthreads() { cuda_on_host::wait_for_block(false); }
inline int __syncthreads_or(int vote) { return cuda_on_host::wait_for_block(vote != 0) > 0; }
inline void __threadfence() {}

template <class T>
T __shfl_sync(uint32_t mask, T value, int from, int width = 32) {
  const unsigned lane = cuda_on_host::lane();
  const unsigned base = lane / width * width;
  return cuda_on_host::of_lane(mask, value, base + static_cast<unsigned>(from) % width);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits) {
  return cuda_on_host::of_lane(mask, value, cuda_on_host::lane() ^ bits);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned by, int width = 32) {
  const unsigned lane = cuda_on_host::lane();
  return cuda_on_host::of_lane(mask, value, lane % width + by < unsigned(width) ? lane + by : lane);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned by, int width = 32) {
  const unsigned lane = cuda_on_host::lane();
  return cuda_on_host::of_lane(mask, value, lane % width >= by ? lane - by : lane);
}
inline uint32_t __ballot_sync(uint32_t mask, int vote) {
  const uint64_t* words = cuda_on_host::wait_for_warp(mask, vote != 0);
  uint32_t bits = 0;
  for (int lane = 0; lane < cuda_on_host::kLanes; ++lane) {
    bits |= (mask >> lane & 1) != 0 && words[lane] == 1 ? 1u << lane : 0u;
  }
  return bits;
}
template <class T>
uint32_t __match_any_sync(uint32_t mask, T value) {
  const uint64_t* words = cuda_on_host::wait_for_warp(mask, cuda_on_host::to_word(value));
  uint32_t bits = 0;
  for (int lane = 0; lane < cuda_on_host::kLanes; ++lane) {
    const bool same = words[lane] == cuda_on_host::to_word(value);
    bits |= (mask >> lane & 1) != 0 && same ? 1u << lane : 0u;
  }
  return bits;
}

template <class Op>
int reduce_lanes(uint32_t mask, int value, const Op& op) {
  const uint64_t* words = cuda_on_host::wait_for_warp(mask, cuda_on_host::to_word(value));
  for (int lane = 0; lane < cuda_on_host::kLanes; ++lane) {
    if ((mask >> lane & 1) != 0) {
      value = op(value, static_cast<int>(static_cast<uint32_t>(words[lane])));
    }
  }
  return value;
}
inline int __reduce_min_sync(uint32_t mask, int value) {
  return reduce_lanes(mask, value, [](int a, int b) { return b < a ? b : a; });
}
inline int __reduce_max_sync(uint32_t mask, int value) {
  return reduce_lanes(mask, value, [](int a, int b) { return b > a ? b : a; });
}

inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __ffs(uint32_t bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}

// Atomics: a fiber is not interrupted.

template <class T, class Op>
T change_atomically(T* at, const Op& op) {
  cuda_on_host::let_others_run();
  const T before = *at;
  *at = op(before);
  return before;
}
template <class T>
T atomicAdd(T* at, std::common_type_t<T> value) {
  return change_atomically(at, [&](T before) { return static_cast<T>(before + value); });
}
template <class T>
T atomicMin(T* at, std::common_type_t<T> value) {
  return change_atomically(at, [&](T before) { return value < before ? value : before; });
}
template <class T>
T atomicMax(T* at, std::common_type_t<T> value) {
  return change_atomically(at, [&](T before) { return value > before ? value : before; });
}
template <class T>
T atomicCAS(T* at, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return change_atomically(at, [&](T before) { return before == expected ? value : before; });
}

// The runtime. The device is small, so that grids have to loop.

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };

inline const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 2 : 99 * 1024;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > 99 * 1024) {
    return cudaErrorInvalidValue;
  }
  cuda_on_host::grant(reinterpret_cast<const void*>(kernel), static_cast<size_t>(bytes));
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int byte, size_t bytes, cudaStream_t) {
  cuda_on_host::count_memset();
  std::memset(at, byte, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  cuda_on_host::count_sync();
  return cudaSuccess;
}

template <class... Params, size_t... index>
void call_kernel(void (*kernel)(Params...), void** arguments, std::index_sequence<index...>) {
  kernel(*static_cast<std::remove_reference_t<Params>*>(arguments[index])...);
}

template <class... Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params...), dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t) {
  if (grid.x == 0 || block.x == 0 || block.x > 1024 ||
      shared_bytes > cuda_on_host::granted_to(reinterpret_cast<const void*>(kernel))) {
    return cudaErrorInvalidValue;
  }
  struct Call {
    void (*kernel)(Params...);
    void** arguments;
  } call = {kernel, arguments};
  cuda_on_host::run_grid(
      grid, block, shared_bytes,
      [](void* argument) {
        const auto* of = static_cast<Call*>(argument);
        call_kernel(of->kernel, of->arguments, std::index_sequence_for<Params...>());
      },
      &call);
  return cudaSuccess;
}

extern "C" inline AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
