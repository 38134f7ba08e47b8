// CUDA kernels and glue of fake_quantize: the formulas of fake_quantize.h, a warp's ballot for the
// mask. Scales are read on the device; nothing is read back.
#include <optional>

#include "../../core/cuda.h"
#include "../../core/device_layout.cuh"
#include "fake_quantize_glue.h"

namespace pyobserver {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 16;

// The parameters as they lie on the device.
struct DeviceParams {
  const float* scale;
  const void* zero_point;
  ZeroPointType type;
  DeviceSwitch enabled;
};

// y may be x: each thread reads what it writes.
template <class T>
__global__ void forward_kernel(const T* x, T* y, uint8_t* __restrict__ mask, int64_t n,
                               DeviceParams params, DeviceLayout layout, QuantGrid grid) {
  const bool off = is_off(params.enabled);
  const int64_t step = threads_of_grid();
  // whole warps, so that every ballot has all its lanes
  const int64_t rounded = (n + 31) / 32 * 32;
  for (int64_t i = thread_of_grid(); i < rounded; i += step) {
    bool inside = false;
    if (i < n) {
      const int64_t group = group_of(layout, i);
      const float scale = params.scale[group];
      const double zero_point = read_zero_point(params.zero_point, params.type, group);
      const auto q =
          to_grid(widen(x[i]), 1.0f / scale, static_cast<float>(zero_point), grid.float_zero_point);
      T value;
      if (grid.wide) {
        store(from_grid_wide(q, scale, zero_point, grid, &inside), &value);
      } else {
        from_float(from_grid(q, scale, static_cast<float>(zero_point), grid, &inside), &value);
      }
      if (!off) {
        y[i] = value;
      } else if (x != y) {
        y[i] = x[i];
      }
      inside |= off;
    }
    if (mask != nullptr) {
      const uint32_t bits = __ballot_sync(kAllLanes, inside);
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
  for (int64_t i = thread_of_grid(); i < n; i += threads_of_grid()) {
    store(static_cast<double>(widen(grad[i]) * static_cast<float>((mask[i / 8] >> (i % 8)) & 1)),
          &out[i]);
  }
}

}  // namespace

Tensor fake_quantize_forward(const char* op, const FakeQuantizeArgs& args) {
  const DType dtype = input_dtype(op, "x", args.x);
  check_grid_params(op, args.x, args.scale, args.zero_point, args.quant_min, args.quant_max,
                    args.grouping);
  const DeviceSwitch enabled = device_switch(op, "enabled", args.enabled, args.x);
  const int64_t n = args.x.numel();
  const bool dense = n > 0 && Layout::of_output(args.x, {}).dense;
  if (args.out != nullptr) {
    check_out(op, args.x, *args.out, dense);
  }
  Tensor y = args.out != nullptr ? *args.out : empty_output(args.x, dense);
  if (n == 0) {
    return y;
  }
  const Tensor x = dense ? args.x : torch::stable::contiguous(args.x);
  const DeviceLayout layout = device_layout(op, Layout::of_output(x, args.grouping));
  const DeviceParams params = {const_data<float>(args.scale), args.zero_point.const_data_ptr(),
                               zero_point_type(args.zero_point), enabled};
  const bool per_group = args.grouping.axis >= 0 || args.grouping.block_size != nullptr;
  const QuantGrid grid = quant_grid(dtype, args.quant_min, args.quant_max, per_group,
                                    params.type == ZeroPointType::float32);
  const CudaContext cuda(op, x);
  const unsigned blocks = cuda.blocks(n, kThreads, kBlocksPerMultiprocessor);
  void* to = y.mutable_data_ptr();
  dispatch(dtype, x.const_data_ptr(), [&](const auto* from) {
    using T = typename Pointee<decltype(from)>::type;
    cuda.launch(forward_kernel<T>, blocks, kThreads, 0, from, static_cast<T*>(to), args.mask, n,
                params, layout, grid);
  });
  return y;
}

namespace {

Tensor fake_quantize_backward(const Tensor& grad, const Tensor& mask) {
  const DType dtype = input_dtype(kFakeQuantizeBackward, "grad", grad);
  check_backward(kFakeQuantizeBackward, grad, mask);
  Tensor out = empty_output(grad, grad.numel() > 0);
  const int64_t n = grad.numel();
  if (n == 0) {
    return out;
  }
  const CudaContext cuda(kFakeQuantizeBackward, grad);
  const unsigned blocks = cuda.blocks(n, kThreads, kBlocksPerMultiprocessor);
  void* to = out.mutable_data_ptr();
  const uint8_t* bits = const_data<uint8_t>(mask);
  dispatch(dtype, grad.const_data_ptr(), [&](const auto* from) {
    using T = typename Pointee<decltype(from)>::type;
    cuda.launch(backward_kernel<T>, blocks, kThreads, 0, from, bits, static_cast<T*>(to), n);
  });
  return out;
}

}  // namespace
}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CUDA, m) {
  m.impl("_fake_quantize", TORCH_BOX(&pyobserver::fake_quantize));
  m.impl("_fake_quantize_out", TORCH_BOX(&pyobserver::fake_quantize_out));
  m.impl("_fake_quantize_mask", TORCH_BOX(&pyobserver::fake_quantize_mask));
  m.impl("_fake_quantize_backward", TORCH_BOX(&pyobserver::fake_quantize_backward));
}
