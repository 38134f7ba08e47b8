// What the CUDA glue needs of the device: its current stream, a guard, a grid. The stream is the
// shim's current one; a Stream's id() is no handle.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "check.h"
#include "torch_api.h"

namespace pyobserver {

struct CudaLaunch {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
  unsigned blocks;

  CudaLaunch(const Tensor& x, int64_t n, int threads) : guard(x.get_device_index()) {
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(x.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
    constexpr int64_t kMostBlocks = 132 * 16;  // the kernels loop over what a grid does not cover
    blocks = static_cast<unsigned>(std::min<int64_t>((n + threads - 1) / threads, kMostBlocks));
  }
};

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  check(error == cudaSuccess, op, ": the CUDA launch failed: ", cudaGetErrorString(error));
}

}  // namespace pyobserver
