// What the CUDA kernels share: wide loads, reductions of warps and blocks, the last block of a
// grid.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "dtype.h"

#define PYOBS_DEVICE static __device__ __forceinline__
#define PYOBS_MEMBER __device__ __forceinline__

// For what a thread does once: a function of its own takes no registers from the loops beside it.
#if defined(__CUDACC__)
#define PYOBS_DEVICE_ONCE static __device__ __noinline__
#else
#define PYOBS_DEVICE_ONCE static __attribute__((noinline))
#endif

#if !defined(PYOBS_DYNAMIC_SHARED)
// The dynamic shared memory of the launch, 16-byte aligned.
#define PYOBS_DYNAMIC_SHARED(T, name)                           \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  T* name = reinterpret_cast<T*>(name##_bytes)
#endif

namespace pyobserver {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kMostWarps = 32;  // of a block

// What a thread loads and stores at once: 16 bytes, or less where the data does not lie for it.
template <class T, int count = 16 / sizeof(T)>
struct alignas(count * sizeof(T)) Pack {
  static constexpr int size = count;
  T values[size];
};

PYOBS_HD bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

PYOBS_DEVICE int64_t thread_of_grid() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
PYOBS_DEVICE int64_t threads_of_grid() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// to_float and from_float by one instruction; a NaN becomes the device's own.
PYOBS_DEVICE float widen_fast(float value) { return value; }
PYOBS_DEVICE double widen_fast(double value) { return value; }
PYOBS_DEVICE float widen_fast(BFloat16 value) { return to_float(value); }
PYOBS_DEVICE float widen_fast(Half value) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  return to_float(value);
#endif
}
PYOBS_DEVICE void narrow_fast(double value, double* out) { *out = value; }
PYOBS_DEVICE void narrow_fast(double value, float* out) { *out = static_cast<float>(value); }
PYOBS_DEVICE void narrow_fast(double value, BFloat16* out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out->bits) : "f"(static_cast<float>(value)));
#else
  from_float(static_cast<float>(value), out);
#endif
}
PYOBS_DEVICE void narrow_fast(double value, Half* out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(static_cast<float>(value)));
#else
  from_float(static_cast<float>(value), out);
#endif
}

// op is commutative and associative; every lane gets the result.
template <class T, class Op>
PYOBS_DEVICE T reduce_warp(T value, const Op& op) {
  for (int bits = kWarp / 2; bits > 0; bits /= 2) {
    value = op(value, __shfl_xor_sync(kAllLanes, value, bits));
  }
  return value;
}

// Of a block of whole warps, all of whose threads call it; every thread gets the result.
template <class T, class Op>
PYOBS_DEVICE T reduce_block(T value, T identity, const Op& op) {
  __shared__ T of_warps[kMostWarps];
  value = reduce_warp(value, op);
  __syncthreads();  // the values of the call before have been read
  if (threadIdx.x % kWarp == 0) {
    of_warps[threadIdx.x / kWarp] = value;
  }
  __syncthreads();
  const unsigned lane = threadIdx.x % kWarp;
  return reduce_warp(lane < blockDim.x / kWarp ? of_warps[lane] : identity, op);
}

// The values of all threads before, and of all, taken together by op, which is associative. Called
// as reduce_block.
template <class T>
struct Scanned {
  T before, all;
};

template <class T, class Op>
PYOBS_DEVICE Scanned<T> scan_block(T value, T identity, const Op& op) {
  __shared__ T of_warps[kMostWarps];
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (unsigned by = 1; by < kWarp; by *= 2) {
    const T below = __shfl_up_sync(kAllLanes, value, by);
    value = lane >= by ? op(below, value) : value;
  }
  const T of_lanes = __shfl_up_sync(kAllLanes, value, 1);
  __syncthreads();  // the values of the call before have been read
  if (lane == kWarp - 1) {
    of_warps[warp] = value;
  }
  __syncthreads();
  Scanned<T> found = {identity, identity};
  for (unsigned i = 0; i < blockDim.x / kWarp; ++i) {
    found.before = i == warp ? found.all : found.before;
    found.all = op(found.all, of_warps[i]);
  }
  found.before = lane > 0 ? op(found.before, of_lanes) : found.before;
  return found;
}

// In one lane of those in the mask, each of which asks with the same one.
PYOBS_DEVICE bool is_first_of(uint32_t lanes) {
  return __ffs(lanes) - 1 == static_cast<int>(threadIdx.x % kWarp);
}

// value = op(value), where the order in which threads do this makes no difference. A value that
// stays as it is costs a load.
template <class Op>
PYOBS_DEVICE void change(float* value, const Op& op) {
  auto* bits = reinterpret_cast<uint32_t*>(value);
  uint32_t seen = __ldcg(bits);
  for (;;) {
    const uint32_t next = float_to_bits(op(bits_to_float(seen)));
    const uint32_t found = next == seen ? seen : atomicCAS(bits, seen, next);
    if (found == seen) {
      return;
    }
    seen = found;
  }
}

// True in the block that comes last of so many to pass here, which then sees all that the others
// wrote before. count: of the device, zero before.
PYOBS_DEVICE bool is_last_block(unsigned* count, unsigned blocks) {
  __threadfence();
  int last = 0;
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(count, 1u) == blocks - 1;
  }
  const bool result = __syncthreads_or(last) != 0;
  __threadfence();
  return result;
}

// The memory that a launch gives each block of its grid; see BlockMemory.
struct MemoryOfBlocks {
  unsigned char* scratch;  // null: the dynamic shared memory
  int64_t bytes;
};

PYOBS_DEVICE unsigned char* memory_of_block(const MemoryOfBlocks& memory) {
  PYOBS_DYNAMIC_SHARED(unsigned char, shared);
  return memory.scratch == nullptr ? shared : memory.scratch + memory.bytes * blockIdx.x;
}

// A switch of the state, uint8, bool or int64; null is on.
struct DeviceSwitch {
  const void* flag;
  bool is_int64;
};

PYOBS_DEVICE bool is_off(const DeviceSwitch& enabled) {
  if (enabled.flag == nullptr) {
    return false;
  }
  return enabled.is_int64 ? *static_cast<const int64_t*>(enabled.flag) == 0
                          : *static_cast<const uint8_t*>(enabled.flag) == 0;
}

// Division by a number known before the launch, of dividends below 2^31.
struct Divisor {
  uint32_t divisor, multiplier, shift;

  Divisor() = default;
  explicit Divisor(int64_t by) : divisor(static_cast<uint32_t>(by)), shift(0) {
    while ((uint64_t{1} << shift) < divisor) {
      ++shift;
    }
    const uint64_t one = 1;
    multiplier = static_cast<uint32_t>((one << 32) * ((one << shift) - divisor) / divisor + 1);
  }
  PYOBS_MEMBER uint32_t divide(uint32_t dividend) const {
    return (__umulhi(dividend, multiplier) + dividend) >> shift;
  }
  __device__ __forceinline__ uint32_t remainder(uint32_t dividend) const {
    return dividend - divide(dividend) * divisor;
  }
};

}  // namespace pyobserver
