// CUDA kernels and glue of tensor_quant and fake_tensor_quant: the formulas of tensor_quant.h.
//
// Each element is read once and written once, in packs of 16 bytes where they are aligned; the
// mask adds a bit. A thread takes a pack at a time, and the lanes that share a byte of the mask put
// it together. An amax is read, and its scale computed, once where there is one, once a pack where
// no pack lies across two, else for each element. tensor_quant writes its scales in the same
// launch. One launch each; nothing is read back, so no value is checked.
#include "../../core/cuda.h"
#include "../../core/device_layout.cuh"
#include "../../core/packs.cuh"
#include "../fake_quantize/mask_backward.h"
#include "tensor_quant_glue.h"

namespace pyobserver {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 16;

// The values of amax as they lie on the device, and where the scales go, or null.
struct DeviceAmax {
  const void* values;
  DType type;
  void* scales;
  int64_t count;
};

// A call, not inlined: it is needed at most once a pack, or in loops that are slow anyhow.
template <class Compute>
static __device__ __attribute__((noinline)) AmaxScale<Compute> amax_at(const void* values,
                                                                       DType type, int64_t at,
                                                                       float max_bound) {
  float value;
  switch (type) {
    case DType::float64:
      return read_amax<Compute>(static_cast<const double*>(values)[at], max_bound);
    case DType::float16:
      value = to_float(static_cast<const Half*>(values)[at]);
      break;
    case DType::bfloat16:
      value = to_float(static_cast<const BFloat16*>(values)[at]);
      break;
    default:
      value = static_cast<const float*>(values)[at];
  }
  return read_amax<Compute>(value, max_bound);
}

template <class T>
using ComputeOf = decltype(widen(T{}));

template <class T>
__global__ void forward_kernel(const T* __restrict__ x, T* __restrict__ y,
                               uint8_t* __restrict__ mask, int64_t n, DeviceAmax amax,
                               DividedLayout layout, AmaxGrid grid, bool fake, bool aligned) {
  using Compute = ComputeOf<T>;
  constexpr int kSize = Pack<T>::size;
  const int64_t thread = thread_of_grid(), threads = threads_of_grid();
  if (amax.scales != nullptr) {
    for (int64_t i = thread; i < amax.count; i += threads) {
      const AmaxScale<double> of_amax = amax_at<double>(amax.values, amax.type, i, grid.max_bound);
      store(of_amax.divisor, static_cast<T*>(amax.scales) + i);
    }
  }
  if (n == 0) {
    return;
  }
  const bool one = layout.groups == 1;
  const bool of_pack = layout.inner % kSize == 0;  // no pack lies across two
  AmaxScale<Compute> scale = amax_at<Compute>(amax.values, amax.type, 0, grid.max_bound);
  // whole warps, for the mask
  const int64_t packs = ((n + kSize - 1) / kSize + kWarp - 1) / kWarp * kWarp;
  for (int64_t pack = thread; pack < packs; pack += threads) {
    const int64_t first = pack * kSize;
    uint32_t inside = 0;
    if (first < n) {
      Pack<T> values = load_pack(x + first, n - first, aligned);
      if (!one && of_pack) {
        scale = amax_at<Compute>(amax.values, amax.type, group_of(layout, first), grid.max_bound);
      }
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (first + i < n) {
          if (!one && !of_pack) {
            scale = amax_at<Compute>(amax.values, amax.type, group_of(layout, first + i),
                                     grid.max_bound);
          }
          const Compute value = widen(values.values[i]);
          const Compute q = to_amax_grid(value, scale.multiplier, grid);
          inside |= (is_within(value, scale.amax) ? 1u : 0u) << i;
          store(fake ? q / scale.divisor : q, &values.values[i]);
        }
      }
      store_pack(values, y + first, n - first, aligned);
    }
    if (mask != nullptr) {
      store_mask<kSize>(mask, first, n, inside);
    }
  }
}

// Of the bits of the gradients, as on the CPU.
template <class Bits>
__global__ void backward_kernel(const Bits* grad, const uint8_t* __restrict__ mask, Bits* out,
                                int64_t n, bool aligned) {
  constexpr int kSize = Pack<Bits>::size;
  for (int64_t first = thread_of_grid() * kSize; first < n; first += threads_of_grid() * kSize) {
    Pack<Bits> values = load_pack(grad + first, n - first, aligned);
    const uint32_t kept = static_cast<uint32_t>(mask[first / 8]) >> (first % 8);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      values.values[i] = (kept >> i) & 1u ? values.values[i] : Bits{0};
    }
    store_pack(values, out + first, n - first, aligned);
  }
}

}  // namespace

Tensor tensor_quant_forward(const char* op, const TensorQuantArgs& args, Tensor* scale) {
  const DType dtype = input_dtype(op, "inputs", args.x);
  const AmaxGrouping grouping(op, args.x, args.amax);
  const int64_t n = args.x.numel();
  const bool dense = n > 0 && Layout::of_output(args.x, {}).dense;
  const Tensor x = n == 0 || dense ? args.x : torch::stable::contiguous(args.x);
  const DividedLayout layout = divided_layout(op, Layout::of_output(x, grouping.grouping()));
  Tensor y = empty_output(x, dense);
  DeviceAmax amax = {args.amax.const_data_ptr(), input_dtype(op, "amax", args.amax), nullptr, 0};
  if (scale != nullptr) {
    *scale = empty_scale(args);
    amax.scales = scale->mutable_data_ptr();
    amax.count = args.amax.numel();
  }
  if (n == 0 && amax.count == 0) {
    return y;
  }
  const CudaContext cuda(op, args.x);
  void* to = y.mutable_data_ptr();
  dispatch(dtype, x.const_data_ptr(), [&](const auto* from) {
    using T = typename Pointee<decltype(from)>::type;
    const bool aligned = is_aligned(from) && is_aligned(to);
    const int64_t packs = std::max(n / Pack<T>::size + 1, amax.count);
    cuda.launch(forward_kernel<T>, cuda.blocks(packs, kThreads, kBlocksPerMultiprocessor), kThreads,
                0, from, static_cast<T*>(to), args.mask, n, amax, layout, args.grid, args.fake,
                aligned);
  });
  return y;
}

namespace {

template <class Bits>
void launch_backward(const CudaContext& cuda, const void* grad, const uint8_t* mask, void* out,
                     int64_t n) {
  const unsigned blocks = cuda.blocks(n, kThreads * Pack<Bits>::size, kBlocksPerMultiprocessor);
  cuda.launch(backward_kernel<Bits>, blocks, kThreads, 0, static_cast<const Bits*>(grad), mask,
              static_cast<Bits*>(out), n, is_aligned(grad) && is_aligned(out));
}

// grad may be out: a thread reads and writes elements of its own.
auto backward_launch(const Tensor& grad) {
  return [&grad](DType dtype, const void* from, const uint8_t* bits, void* to, int64_t n) {
    const CudaContext cuda(kTensorQuantBackward, grad);
    switch (element_size(dtype)) {
      case 8:
        launch_backward<uint64_t>(cuda, from, bits, to, n);
        break;
      case 4:
        launch_backward<uint32_t>(cuda, from, bits, to, n);
        break;
      default:
        launch_backward<uint16_t>(cuda, from, bits, to, n);
    }
  };
}

Tensor tensor_quant_backward(const Tensor& grad, const Tensor& mask) {
  return mask_backward(kTensorQuantBackward, grad, mask, backward_launch(grad));
}

void tensor_quant_backward_(Tensor grad, const Tensor& mask) {
  mask_backward_in_place(kTensorQuantBackward, grad, mask, backward_launch(grad));
}

}  // namespace
}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CUDA, m) {
  m.impl("_tensor_quant", TORCH_BOX(&pyobserver::tensor_quant));
  m.impl("_tensor_quant_mask", TORCH_BOX(&pyobserver::tensor_quant_mask));
  m.impl("_tensor_quant_backward", TORCH_BOX(&pyobserver::tensor_quant_backward));
  m.impl("_tensor_quant_backward_", TORCH_BOX(&pyobserver::tensor_quant_backward_));
  m.impl("_fake_tensor_quant", TORCH_BOX(&pyobserver::fake_tensor_quant));
  m.impl("_fake_tensor_quant_mask", TORCH_BOX(&pyobserver::fake_tensor_quant_mask));
}
