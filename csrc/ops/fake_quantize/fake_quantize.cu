// CUDA kernels and glue of fake_quantize: the formulas of fake_quantize.h, a warp's ballot for the
// mask. Scales are read on the device; nothing is read back.
#include <cuda_runtime.h>

#include <optional>
#include <tuple>

#include "../../core/cuda.h"
#include "fake_quantize_glue.h"

namespace pyobserver {
namespace {

constexpr int kThreads = 256;

// The parameters as they lie on the device.
struct DeviceParams {
  const float* scale;
  const void* zero_point;
  ScalarType zero_dtype;
  int64_t channels, inner;
  const void* enabled;  // may be null
  bool enabled_is_int64;
};

__device__ bool switched_off(const DeviceParams& p) {
  if (p.enabled == nullptr) {
    return false;
  }
  return p.enabled_is_int64 ? *static_cast<const int64_t*>(p.enabled) == 0
                            : *static_cast<const uint8_t*>(p.enabled) == 0;
}

__device__ double read_zero_point(const DeviceParams& p, int64_t channel) {
  switch (p.zero_dtype) {
    case ScalarType::Float:
      return static_cast<const float*>(p.zero_point)[channel];
    case ScalarType::Int:
      return static_cast<const int32_t*>(p.zero_point)[channel];
    default:
      return static_cast<double>(static_cast<const int64_t*>(p.zero_point)[channel]);
  }
}

template <class T>
__global__ void forward_kernel(const T* __restrict__ x, T* __restrict__ y,
                               uint8_t* __restrict__ mask, int64_t n, DeviceParams params,
                               QuantGrid grid) {
  const bool off = switched_off(params);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  // whole warps, so that every ballot has all its lanes
  const int64_t rounded = (n + 31) / 32 * 32;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < rounded;
       i += step) {
    bool inside = false;
    if (i < n) {
      const int64_t channel = params.channels == 1 ? 0 : i / params.inner % params.channels;
      const float scale = params.scale[channel];
      const double zero_point = read_zero_point(params, channel);
      const auto q =
          to_grid(widen(x[i]), 1.0f / scale, static_cast<float>(zero_point), grid.float_zero_point);
      T value;
      if (grid.wide) {
        store(from_grid_wide(q, scale, zero_point, grid, &inside), &value);
      } else {
        from_float(from_grid(q, scale, static_cast<float>(zero_point), grid, &inside), &value);
      }
      y[i] = off ? x[i] : value;
      inside |= off;
    }
    if (mask != nullptr) {
      const uint32_t bits = __ballot_sync(0xffffffffu, inside);
      const int64_t word = i / 32;
      if ((threadIdx.x & 31) == 0) {
        if (word * 32 + 32 <= n) {
          reinterpret_cast<uint32_t*>(mask)[word] = bits;
        } else {
          for (int byte = 0; byte < 4 && word * 32 + byte * 8 < n; ++byte) {
            mask[word * 4 + byte] = static_cast<uint8_t>(bits >> (8 * byte));
          }
        }
      }
    }
  }
}

template <class T>
__global__ void backward_kernel(const T* __restrict__ grad, const uint8_t* __restrict__ mask,
                                T* __restrict__ out, int64_t n) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) {
    store(static_cast<double>(widen(grad[i]) * static_cast<float>((mask[i / 8] >> (i % 8)) & 1)),
          &out[i]);
  }
}

}  // namespace

Tensor fake_quantize_forward(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                             int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis,
                             const std::optional<Tensor>& enabled, uint8_t* mask) {
  const DType dtype = input_dtype(kFakeQuantize, "x", x);
  const int64_t channel_axis = axis.has_value() ? check_axis(kFakeQuantize, x, *axis) : -1;
  check_grid_params(kFakeQuantize, x, scale, zero_point, quant_min, quant_max, channel_axis);
  check_switch(kFakeQuantize, "enabled", enabled, x);
  Tensor y = empty_output(x);
  const int64_t n = x.numel();
  if (n == 0) {
    return y;
  }
  const DenseInput input(x, channel_axis);
  const ScalarType zero_dtype = dtype_of(zero_point);
  const DeviceParams params = {
      const_data<float>(scale),
      zero_point.const_data_ptr(),
      zero_dtype,
      input.channels,
      input.inner,
      enabled.has_value() ? enabled->const_data_ptr() : nullptr,
      enabled.has_value() && dtype_of(*enabled) == ScalarType::Long,
  };
  const QuantGrid grid =
      quant_grid(dtype, quant_min, quant_max, channel_axis >= 0, zero_dtype == ScalarType::Float);
  const CudaLaunch launch(x, n, kThreads);
  void* to = y.mutable_data_ptr();
  dispatch(dtype, input.tensor.const_data_ptr(), [&](const auto* from) {
    using T = typename Pointee<decltype(from)>::type;
    forward_kernel<T><<<launch.blocks, kThreads, 0, launch.stream>>>(from, static_cast<T*>(to),
                                                                     mask, n, params, grid);
  });
  check_launch(kFakeQuantize);
  return y;
}

namespace {

Tensor fake_quantize_backward(const Tensor& grad, const Tensor& mask) {
  const DType dtype = input_dtype(kFakeQuantizeBackward, "grad", grad);
  check_backward(kFakeQuantizeBackward, grad, mask);
  Tensor out = empty_output(grad);
  const int64_t n = grad.numel();
  if (n == 0) {
    return out;
  }
  const CudaLaunch launch(grad, n, kThreads);
  void* to = out.mutable_data_ptr();
  const uint8_t* bits = const_data<uint8_t>(mask);
  dispatch(dtype, grad.const_data_ptr(), [&](const auto* from) {
    using T = typename Pointee<decltype(from)>::type;
    backward_kernel<T>
        <<<launch.blocks, kThreads, 0, launch.stream>>>(from, bits, static_cast<T*>(to), n);
  });
  check_launch(kFakeQuantizeBackward);
  return out;
}

}  // namespace
}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CUDA, m) {
  m.impl("_fake_quantize", TORCH_BOX(&pyobserver::fake_quantize));
  m.impl("_fake_quantize_mask", TORCH_BOX(&pyobserver::fake_quantize_mask));
  m.impl("_fake_quantize_backward", TORCH_BOX(&pyobserver::fake_quantize_backward));
}
