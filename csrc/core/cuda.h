// What the CUDA glue needs of the device: its current stream, a guard, launches, scratch memory.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "check.h"
#include "device.cuh"
#include "layout.h"
#include "torch_api.h"

namespace pyobserver {

inline void check_cuda(const char* op, cudaError_t error) {
  check(error == cudaSuccess, op, ": CUDA failed: ", cudaGetErrorString(error));
}

// The device of a tensor, which is made the current one, and the stream of a call. The stream is
// the shim's current one; a Stream's id() is no handle.
class CudaContext {
 public:
  CudaContext(const char* op, const Tensor& x)
      : op_(op), guard_(x.get_device_index()), device_(x.get_device_index()) {
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &current));
    stream_ = static_cast<cudaStream_t>(current);
  }

  // Blocks for so many items, a few for each multiprocessor at most: the kernels loop over what a
  // grid does not cover.
  unsigned blocks(int64_t items, int64_t items_per_block, int blocks_per_multiprocessor) const {
    const int64_t needed = (items + items_per_block - 1) / items_per_block;
    const int64_t most =
        int64_t{attribute(cudaDevAttrMultiProcessorCount)} * blocks_per_multiprocessor;
    return static_cast<unsigned>(std::max<int64_t>(1, std::min(needed, most)));
  }

  int64_t most_shared_bytes() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
  // Whether a block may have so much dynamic shared memory, beside the variables of a kernel.
  bool fits(int64_t shared_bytes) const { return shared_bytes <= most_shared_bytes() - kOfKernels; }
  // How many blocks of so much shared memory a multiprocessor holds, but no more than `most`.
  int blocks_that_fit(int64_t shared_bytes, int most) const {
    constexpr int64_t kOfSystem = 1 << 10;  // of each block, beside the variables of the kernel
    const int64_t fitting = most_shared_bytes() / (shared_bytes + 2 * kOfSystem);
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(fitting, most)));
  }

  // Calls kernel(args...) on the stream, with so many bytes of dynamic shared memory for each
  // block.
  template <class... Params, class... Args>
  void launch(void (*kernel)(Params...), unsigned blocks, unsigned threads, int64_t shared_bytes,
              const Args&... args) const {
    // more has to be asked for, and the variables of the kernel count too
    constexpr int64_t kGranted = (48 << 10) - kOfKernels;
    if (shared_bytes > kGranted) {
      check_cuda(op_, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(shared_bytes)));
    }
    std::tuple<Params...> values(args...);
    std::apply(
        [&](auto&... value) {
          void* pointers[] = {const_cast<void*>(static_cast<const void*>(&value))...};
          check_cuda(op_, cudaLaunchKernel(kernel, dim3(blocks), dim3(threads), pointers,
                                           static_cast<size_t>(shared_bytes), stream_));
        },
        values);
  }

  void zero(void* data, int64_t bytes) const {
    check_cuda(op_, cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), stream_));
  }

  // A value of the device. It waits for the stream: for what a caller asked to be told at once.
  template <class T>
  T read(const T* from) const {
    T value;
    check_cuda(op_, cudaMemcpyAsync(&value, from, sizeof(T), cudaMemcpyDeviceToHost, stream_));
    check_cuda(op_, cudaStreamSynchronize(stream_));
    return value;
  }

 private:
  // bytes of shared variables, at most, of a kernel that has dynamic shared memory
  static constexpr int64_t kOfKernels = 4 << 10;

  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  int32_t device_;
  cudaStream_t stream_;

  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check_cuda(op_, cudaDeviceGetAttribute(&value, which, device_));
    return value;
  }
};

inline DeviceSwitch device_switch(const char* op, const char* name,
                                  const std::optional<Tensor>& enabled, const Tensor& x) {
  check_switch(op, name, enabled, x);
  if (!enabled.has_value()) {
    return {nullptr, false};
  }
  return {enabled->const_data_ptr(), dtype_of(*enabled) == ScalarType::Long};
}

// Memory of the device for one call, from torch's allocator, which gives it to no other stream.
// Not initialized.
class DeviceScratch {
 public:
  DeviceScratch(const Tensor& like, int64_t bytes)
      : memory_(empty_strided(like, {&bytes, 1}, {&kStride, 1}, aoti_torch_dtype_uint8())) {}
  template <class T>
  T* at(int64_t byte) const {
    return reinterpret_cast<T*>(mutable_data<uint8_t>(memory_) + byte);
  }

 private:
  static constexpr int64_t kStride = 1;
  Tensor memory_;
};

// Memory of so many bytes for each block of a grid: shared where that suffices, else the device's.
class BlockMemory {
 public:
  BlockMemory(const CudaContext& cuda, const Tensor& like, int64_t bytes, unsigned blocks)
      : bytes_((bytes + 15) / 16 * 16) {
    if (!cuda.fits(bytes_)) {
      scratch_.emplace(like, bytes_ * blocks);
    }
  }
  int64_t shared_bytes() const { return scratch_.has_value() ? 0 : bytes_; }
  MemoryOfBlocks of_blocks() const {
    return {scratch_.has_value() ? scratch_->at<unsigned char>(0) : nullptr, bytes_};
  }

 private:
  int64_t bytes_;
  std::optional<DeviceScratch> scratch_;
};

}  // namespace pyobserver
