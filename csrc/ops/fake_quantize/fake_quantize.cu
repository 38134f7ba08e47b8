// CUDA kernels and glue of fake_quantize: the formulas of fake_quantize.h. One launch each; the
// forward reads and writes every element once, and an eighth of a byte of mask. Scales are read on
// the device; nothing is read back.
//
// A thread takes packs of 16 bytes, `step` packs from each other, and loads the next while it works
// on one; a warp takes packs in a row, whose bits its lanes put together to bytes. How a thread
// finds the scale of its elements makes the kinds of kernel (Kind).
#include <numeric>
#include <optional>

#include "../../core/cuda.h"
#include "../../core/device_layout.cuh"
#include "fake_quantize_glue.h"
#include "mask_backward.h"

namespace pyobserver {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 32;  // some waves, so that the last is a small part

enum class Kind {
  tensor,  // one scale
  period,  // steps are whole periods of the channels: the elements of a thread have one scale each
  run,     // a pack lies in one run of a channel, or in two
  element  // any layout and place of x, an element at a time
};

// The parameters as they lie on the device.
struct DeviceParams {
  const float* scale;
  const void* zero_point;
  ZeroPointType type;
  bool rounds;        // a float zero point, to an integer of the grid
  float least_scale;  // with that: see usable_scale
  DeviceSwitch enabled;
};

template <class Zero>
struct GroupParams {
  float scale, inverse_scale;
  Zero zero_point;
};

template <class Zero>
PYOBS_DEVICE GroupParams<Zero> load_params(const DeviceParams& params, int64_t group,
                                           const QuantGrid& grid) {
  float scale = params.scale[group];
  Zero zero_point = read_zero_point<Zero>(params.zero_point, params.type, group);
  if (params.rounds) {
    scale = usable_scale(scale, static_cast<float>(zero_point), params.least_scale);
    zero_point = static_cast<Zero>(rounded_zero_point(static_cast<float>(zero_point), grid));
  }
  return {scale, 1.0f / scale, zero_point};
}

template <class T>
PYOBS_DEVICE bool quantize(T x, T* y, const GroupParams<float>& params, const QuantGrid& grid,
                           bool float_zero_point) {
  bool inside;
  const auto q = to_grid(widen_fast(x), params.inverse_scale, params.zero_point, float_zero_point);
  narrow_fast(from_grid(q, params.scale, params.zero_point, grid, &inside), y);
  return inside;
}

template <class T>
PYOBS_DEVICE bool quantize(T x, T* y, const GroupParams<double>& params, const QuantGrid& grid,
                           bool float_zero_point) {
  bool inside;
  const auto q = to_grid(widen_fast(x), params.inverse_scale, static_cast<float>(params.zero_point),
                         float_zero_point);
  narrow_fast(from_grid_wide(q, params.scale, params.zero_point, grid, &inside), y);
  return inside;
}

// params_of(j): of element j. Gives the bits of those inside.
template <class T, int size, class ParamsOf>
PYOBS_DEVICE uint32_t quantize_pack(Pack<T, size>* pack, const QuantGrid& grid,
                                    bool float_zero_point, const ParamsOf& params_of) {
  uint32_t bits = 0;
#pragma unroll
  for (int j = 0; j < size; ++j) {
    T* value = &pack->values[j];
    const bool inside = quantize(*value, value, params_of(j), grid, float_zero_point);
    bits |= inside ? 1u << j : 0u;
  }
  return bits;
}

// The bits of `size` elements of each lane, as bytes in the lanes that one begins with.
template <int size>
PYOBS_DEVICE uint32_t gather_bits(uint32_t bits) {
#pragma unroll
  for (int width = size; width < 8; width *= 2) {
    bits |= __shfl_down_sync(kAllLanes, bits, width / size) << width;
  }
  return bits;
}

struct NoLayout {};  // of Kind::tensor

// Whose element i is.
template <Kind kind, class Index>
PYOBS_DEVICE int64_t group_at(const Index& layout, int64_t i) {
  if constexpr (kind == Kind::tensor) {
    return 0;
  } else if constexpr (kind == Kind::element) {
    return group_of(layout, i);
  } else {
    const uint32_t run = layout.by_inner.divide(static_cast<uint32_t>(i));
    return kind == Kind::period ? layout.by_channels.remainder(run) : group_of_run(layout, run);
  }
}

template <Kind kind, class Zero, class T, class Index>
PYOBS_DEVICE bool quantize_at(T* value, int64_t i, const DeviceParams& params, const Index& layout,
                              const QuantGrid& grid) {
  const int64_t group = group_at<kind>(layout, i);
  return quantize(*value, value, load_params<Zero>(params, group, grid), grid,
                  grid.float_zero_point);
}

// y may be x: each thread reads what it writes. step: in packs; threads from there on have none.
template <class T, Kind kind, class Zero, class Index>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const T* x, T* y, uint8_t* __restrict__ mask, int64_t n, int64_t step,
                   DeviceParams params, Index layout, QuantGrid grid) {
  constexpr int kSize = kind == Kind::element ? 1 : Pack<T>::size;
  constexpr int kLanesOfByte = kSize < 8 ? 8 / kSize : 1;
  constexpr int kScales = kind == Kind::period ? kSize : 1;
  constexpr bool kWide = sizeof(Zero) == sizeof(double);
  using Some = Pack<T, kSize>;

  // whole bytes of the mask; the elements after the last come at the end
  const int64_t packs = kSize == 1 ? n : n / 8 * 8 / kSize;
  const int lane = threadIdx.x % kWarp;
  const int64_t thread = thread_of_grid();
  const bool off = is_off(params.enabled);
  // by channel or block a float zero point makes the result wide
  const bool float_zero_point = (kind == Kind::tensor || kWide) && grid.float_zero_point;

  GroupParams<Zero> kept[kScales];
  if constexpr (kind == Kind::tensor || kind == Kind::period) {
#pragma unroll
    for (int j = 0; j < kScales; ++j) {
      const int64_t first = thread * kSize + j;
      kept[j] = load_params<Zero>(params, group_at<kind>(layout, first < n ? first : 0), grid);
    }
  }
  const auto load = [&](int64_t pack, Some* values) {
    if (pack >= packs || thread >= step) {
      return false;
    }
    int64_t from = pack * kSize;
    if constexpr (kind == Kind::element) {
      from = place_of(layout, pack);
    }
    *values = *reinterpret_cast<const Some*>(x + from);
    return true;
  };
  Some next = {};
  bool is_next = load(thread, &next);
#pragma unroll 1
  for (int64_t row = thread - lane; row < packs; row += step) {
    const int64_t pack = row + lane;
    Some values = next;
    const bool valid = is_next;
    is_next = load(pack + step, &next);
    uint32_t bits = valid ? (1u << kSize) - 1 : 0u;
    if (valid && !off) {
      if constexpr (kind == Kind::element) {
        bits = grid.wide ? quantize_at<kind, double>(values.values, pack, params, layout, grid)
                         : quantize_at<kind, float>(values.values, pack, params, layout, grid);
      } else if constexpr (kind == Kind::run) {
        const auto first = static_cast<uint32_t>(pack * kSize);
        const uint32_t run = layout.by_inner.divide(first);
        const uint32_t left = (run + 1) * layout.by_inner.divisor - first;
        const auto here = load_params<Zero>(params, group_of_run(layout, run), grid);
        if (left >= kSize) {
          bits = quantize_pack(&values, grid, float_zero_point, [&](int) { return here; });
        } else {
          const auto after = load_params<Zero>(params, group_of_run(layout, run + 1), grid);
          bits = quantize_pack(&values, grid, float_zero_point,
                               [&](int j) { return j < static_cast<int>(left) ? here : after; });
        }
      } else {
        bits = quantize_pack(&values, grid, float_zero_point,
                             [&](int j) { return kept[j % kScales]; });
      }
    }
    if (valid && (!off || x != y)) {
      *reinterpret_cast<Some*>(y + pack * kSize) = values;
    }
    if (mask != nullptr) {
      bits = gather_bits<kSize>(bits);
      if (valid && lane % kLanesOfByte == 0) {
        mask[pack / kLanesOfByte] = static_cast<uint8_t>(bits);
      }
    }
  }
  const int64_t i = packs * kSize + thread;
  if (kSize > 1 && packs * kSize < n && thread < kWarp) {
    bool inside = false;
    if (i < n) {
      T value = x[i];
      inside = off || quantize_at<kind, Zero>(&value, i, params, layout, grid);
      y[i] = value;
    }
    const uint32_t bits = __ballot_sync(kAllLanes, inside);
    if (mask != nullptr && lane == 0) {
      mask[i / 8] = static_cast<uint8_t>(bits);
    }
  }
}

template <class T, int size>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const T* grad, const uint8_t* __restrict__ mask, T* out, int64_t n) {
  using Some = Pack<T, size>;
  const int64_t packs = n / size;
  const int64_t step = threads_of_grid();
  // a product, as in torch: a clipped NaN stays NaN, a clipped -1 is -0
  const auto take = [](T value, uint32_t bit) {
    T product;
    narrow_fast(widen_fast(value) * (bit != 0 ? 1.0f : 0.0f), &product);
    return product;
  };
  const auto load = [&](int64_t pack, Some* values, uint32_t* bits) {
    if (pack < packs) {
      *values = *reinterpret_cast<const Some*>(grad + pack * size);
      *bits = uint32_t{mask[pack * size / 8]} >> (pack * size % 8);
    }
  };
  Some next = {};
  uint32_t next_bits = 0;
  load(thread_of_grid(), &next, &next_bits);
#pragma unroll 1
  for (int64_t pack = thread_of_grid(); pack < packs; pack += step) {
    Some values = next;
    const uint32_t bits = next_bits;
    load(pack + step, &next, &next_bits);
#pragma unroll
    for (int j = 0; j < size; ++j) {
      values.values[j] = take(values.values[j], bits & 1u << j);
    }
    *reinterpret_cast<Some*>(out + pack * size) = values;
  }
  const int64_t i = packs * size + thread_of_grid();
  if (i < n) {
    out[i] = take(grad[i], mask[i / 8] & 1u << (i % 8));
  }
}

// The packs after which the channels begin anew, and a line of memory with them; 0 if they do not.
int64_t period_of(const DividedLayout& layout, int size) {
  if (!layout.dense || !layout.small || layout.over_count > 0) {
    return 0;
  }
  const int64_t packs = std::lcm(layout.channels * layout.inner, int64_t{size}) / size;
  return std::lcm(packs, int64_t{8});
}

template <class T>
void launch_forward(const CudaContext& cuda, const T* x, T* y, uint8_t* mask,
                    const DeviceParams& params, const DividedLayout& layout,
                    const QuantGrid& grid) {
  constexpr int kSize = Pack<T>::size;
  using Zero = typename std::conditional<sizeof(T) == 8, double, float>::type;
  const int64_t n = layout.numel;
  const bool packed = layout.dense && is_aligned(x) && is_aligned(y);
  const auto launch = [&](auto kernel, unsigned blocks, int64_t step, const auto& index) {
    cuda.launch(kernel, blocks, kThreads, 0, x, y, mask, n, step, params, index, grid);
  };
  const auto blocks = [&](int64_t packs) {
    return cuda.blocks(packs, kThreads, kBlocksPerMultiprocessor);
  };
  unsigned most = blocks((n + kSize - 1) / kSize);
  if (packed && layout.groups == 1 && !grid.wide) {
    launch(forward_kernel<T, Kind::tensor, float, NoLayout>, most, int64_t{most} * kThreads,
           NoLayout{});
    return;
  }
  // wide results of shorter types are rare: one element at a time
  const bool grouped = packed && layout.small && grid.wide == (sizeof(T) == 8);
  const int64_t period = grouped && layout.inner % kSize != 0 ? period_of(layout, kSize) : 0;
  if (period > 0) {
    most = std::max(most, blocks(period));
    const int64_t step = int64_t{most} * kThreads / period * period;
    if (step > 0) {
      launch(forward_kernel<T, Kind::period, Zero, DividedLayout>, most, step, layout);
      return;
    }
  }
  if (grouped && layout.inner >= kSize) {
    launch(forward_kernel<T, Kind::run, Zero, DividedLayout>, most, int64_t{most} * kThreads,
           layout);
    return;
  }
  most = blocks(n);
  launch(forward_kernel<T, Kind::element, float, DividedLayout>, most, int64_t{most} * kThreads,
         layout);
}

}  // namespace

Tensor fake_quantize_forward(const char* op, const FakeQuantizeArgs& args) {
  const Tensor& x = args.x;
  const DType dtype = input_dtype(op, "x", x);
  check_grid_params(op, x, args.scale, args.zero_point, args.quant_min, args.quant_max,
                    args.grouping);
  const DeviceSwitch enabled = device_switch(op, "enabled", args.enabled, x);
  const Layout walk = Layout::of_output(x, args.grouping);
  const bool dense = walk.dense && x.numel() > 0;
  if (args.out != nullptr) {
    check_out(op, x, *args.out, dense);
  }
  Tensor y = args.out != nullptr ? *args.out : empty_output(x, dense);
  if (x.numel() == 0) {
    return y;
  }
  const DividedLayout layout = divided_layout(op, walk);
  const DeviceParams params = {const_data<float>(args.scale),
                               args.zero_point.const_data_ptr(),
                               zero_point_type(args.zero_point),
                               args.rounds_zero_point,
                               args.least_scale,
                               enabled};
  const bool per_group = args.grouping.axis >= 0 || args.grouping.block_size != nullptr;
  const QuantGrid grid = quant_grid(dtype, args.quant_min, args.quant_max, per_group,
                                    params.type == ZeroPointType::float32 && !params.rounds);
  const CudaContext cuda(op, x);
  void* to = y.mutable_data_ptr();
  dispatch(dtype, x.const_data_ptr(), [&](const auto* from) {
    using T = typename Pointee<decltype(from)>::type;
    launch_forward(cuda, from, static_cast<T*>(to), args.mask, params, layout, grid);
  });
  return y;
}

namespace {

// grad may be out: a thread reads and writes elements of its own.
auto backward_launch(const Tensor& grad) {
  return [&grad](DType dtype, const void* from, const uint8_t* bits, void* to, int64_t n) {
    const CudaContext cuda(kFakeQuantizeBackward, grad);
    dispatch(dtype, from, [&](const auto* typed) {
      using T = typename Pointee<decltype(typed)>::type;
      const bool packed = is_aligned(from) && is_aligned(to);
      const int size = packed ? Pack<T>::size : 1;
      const unsigned blocks = cuda.blocks(n / size + 1, kThreads, kBlocksPerMultiprocessor);
      const auto kernel = packed ? backward_kernel<T, Pack<T>::size> : backward_kernel<T, 1>;
      cuda.launch(kernel, blocks, kThreads, 0, typed, bits, static_cast<T*>(to), n);
    });
  };
}

Tensor fake_quantize_backward(const Tensor& grad, const Tensor& mask) {
  return mask_backward(kFakeQuantizeBackward, grad, mask, backward_launch(grad));
}

void fake_quantize_backward_(Tensor grad, const Tensor& mask) {
  mask_backward_in_place(kFakeQuantizeBackward, grad, mask, backward_launch(grad));
}

}  // namespace
}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CUDA, m) {
  m.impl("_fake_quantize", TORCH_BOX(&pyobserver::fake_quantize));
  m.impl("_fake_quantize_out", TORCH_BOX(&pyobserver::fake_quantize_out));
  m.impl("_fake_quantize_mask", TORCH_BOX(&pyobserver::fake_quantize_mask));
  m.impl("_fake_quantize_backward", TORCH_BOX(&pyobserver::fake_quantize_backward));
  m.impl("_fake_quantize_backward_", TORCH_BOX(&pyobserver::fake_quantize_backward_));
}
