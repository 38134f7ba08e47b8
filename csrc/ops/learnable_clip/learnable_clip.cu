// CUDA kernels and glue of learnable_clip: the formulas of learnable_clip.h. One launch each; the
// bounds are read on the device, and nothing is read back, so no value is checked.
//
// Each element is read once and written once, in packs of 16 bytes where they are aligned, and a
// quarter of a byte of mask. Forward: a thread takes a pack at a time, and the lanes that share a
// byte of the mask put it together. Backward: a warp takes a chunk, four packs a thread in flight;
// the sums of chunks stay on the device, 16 bytes each, and the last block adds them.
#include "../../core/cuda.h"
#include "../../core/device_layout.cuh"
#include "../../core/lane_sums.cuh"
#include "../../core/packs.cuh"
#include "learnable_clip_glue.h"

namespace pyobserver {
namespace {

constexpr int kThreads = kLanes;
constexpr int kBlocksPerMultiprocessor = 16;

struct DeviceBounds {
  const float *low, *high;
};

struct ClipBits {
  uint32_t below, above;
};

template <bool quantized, class T, class Compute>
PYOBS_DEVICE ClipBits clip_pack(Pack<T>* pack, const ClipBounds<Compute>& bounds,
                                const AmaxGrid& grid) {
  ClipBits bits = {0, 0};
#pragma unroll
  for (int i = 0; i < Pack<T>::size; ++i) {
    const Compute value = widen_fast(pack->values[i]);
    narrow_fast(clip_result<quantized>(clip(value, bounds), bounds, grid), &pack->values[i]);
    bits.below |= value <= bounds.low ? 1u << i : 0u;
    bits.above |= value >= bounds.high ? 1u << i : 0u;
  }
  return bits;
}

template <class T>
PYOBS_DEVICE Pack<T> load_scattered(const T* x, const DividedLayout& layout, int64_t first,
                                    int64_t n) {
  Pack<T> pack = {};
#pragma unroll
  for (int i = 0; i < Pack<T>::size; ++i) {
    if (i < n) {
      pack.values[i] = x[place_of(layout, first + i)];
    }
  }
  return pack;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const T* __restrict__ x, T* __restrict__ y, ClipMask mask,
                   DeviceBounds of_device, DividedLayout layout, ClipGrid grid, bool aligned) {
  constexpr int kSize = Pack<T>::size;
  const auto bounds = clip_bounds<T>(*of_device.low, *of_device.high, grid);
  const int64_t n = layout.numel;
  // whole warps, for the mask
  const int64_t packs = ((n + kSize - 1) / kSize + kWarp - 1) / kWarp * kWarp;
  for (int64_t pack = thread_of_grid(); pack < packs; pack += threads_of_grid()) {
    const int64_t first = pack * kSize, left = n - first;
    ClipBits bits = {0, 0};
    if (left > 0) {
      Pack<T> values = layout.dense ? load_pack(x + first, left, aligned)
                                    : load_scattered(x, layout, first, left);
      bits = grid.quantized ? clip_pack<true>(&values, bounds, grid.grid)
                            : clip_pack<false>(&values, bounds, grid.grid);
      store_pack(values, y + first, left, aligned);
    }
    if (mask.below != nullptr) {
      const uint32_t valid = left >= kSize ? ~0u : left > 0 ? (1u << left) - 1 : 0u;
      store_mask<kSize>(mask.below, first, n, bits.below & valid);
      store_mask<kSize>(mask.above, first, n, bits.above & valid);
    }
  }
}

// The bits of the elements from `first` on, in the lowest places.
PYOBS_DEVICE uint32_t bits_at(const uint8_t* mask, int64_t first) {
  return uint32_t{mask[first / 8]} >> (first % 8);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(ClipBackward args, int64_t chunks, float* to_low, float* to_high,
                    unsigned* finished, bool aligned) {
  constexpr int kSize = Pack<T>::size;
  constexpr int kOfLanes = kFlight / kSize;  // packs of a thread that make all lanes, once
  constexpr int kInFlight = 4;
  const T* __restrict__ grad = static_cast<const T*>(args.grad);
  T* __restrict__ out = static_cast<T*>(args.out);
  const int lane = threadIdx.x % kWarp;
  const auto write = [&](int64_t, const PairSums& total) {
    *to_low = static_cast<float>(total.first);
    *to_high = static_cast<float>(total.second);
  };
  for (int64_t chunk = thread_of_grid() / kWarp; chunk < chunks;
       chunk += threads_of_grid() / kWarp) {
    const int64_t begin = chunk * args.chunk;
    const int64_t end = begin + args.chunk < args.n ? begin + args.chunk : args.n;
    PairSums sums[kFlight] = {};
    for (int64_t row = begin + lane * kSize; row < end; row += kInFlight * kWarp * kSize) {
      Pack<T> packs[kInFlight];
      ClipBits bits[kInFlight];
#pragma unroll
      for (int p = 0; p < kInFlight; ++p) {
        const int64_t first = row + p * kWarp * kSize;
        packs[p] = load_pack(grad + first, end - first, aligned);
        bits[p] = first < end ? ClipBits{bits_at(args.below, first), bits_at(args.above, first)}
                              : ClipBits{0, 0};
      }
#pragma unroll
      for (int p = 0; p < kInFlight; ++p) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          T* value = &packs[p].values[i];
          PairSums* sum = &sums[p % kOfLanes * kSize + i];
          const uint32_t bit = 1u << i;
          if ((bits[p].below & bit) != 0) {
            sum->first += static_cast<double>(widen_fast(*value));
          }
          if ((bits[p].above & bit) != 0) {
            sum->second += static_cast<double>(widen_fast(*value));
          }
          if (((bits[p].below | bits[p].above) & bit) != 0) {
            *value = T{};
          }
        }
        const int64_t first = row + p * kWarp * kSize;
        store_pack(packs[p], out + first, end - first, aligned);
      }
    }
    const PairSums total = fold_lanes<kSize>(sums, kWarp);
    if (lane == 0 && chunks == 1) {
      write(0, total);
    } else if (lane == 0) {
      args.sums[chunk] = total;
    }
  }
  finish_sums(args.sums, 1, chunks, finished, write);
}

}  // namespace

Tensor learnable_clip_forward(const LearnableClipArgs& args) {
  const Tensor& x = args.x;
  const Layout walk = Layout::of_output(x, {});
  const bool dense = walk.dense && x.numel() > 0;
  Tensor y = empty_output(x, dense);
  if (x.numel() == 0) {
    return y;
  }
  const DividedLayout layout = divided_layout(kLearnableClip, walk);
  const DeviceBounds bounds = {const_data<float>(args.low), const_data<float>(args.high)};
  const CudaContext cuda(kLearnableClip, x);
  void* to = y.mutable_data_ptr();
  dispatch(input_dtype(kLearnableClip, "x", x), x.const_data_ptr(), [&](const auto* from) {
    using T = typename Pointee<decltype(from)>::type;
    const bool aligned = (!dense || is_aligned(from)) && is_aligned(to);
    const unsigned blocks =
        cuda.blocks(x.numel() / Pack<T>::size + 1, kThreads, kBlocksPerMultiprocessor);
    cuda.launch(forward_kernel<T>, blocks, kThreads, 0, from, static_cast<T*>(to), args.mask,
                bounds, layout, args.grid, aligned);
  });
  return y;
}

void learnable_clip_sums(const Tensor& grad, ClipBackward call, int64_t chunks, float* to_low,
                         float* to_high) {
  const CudaContext cuda(kLearnableClipBackward, grad);
  std::optional<DeviceScratch> scratch;
  unsigned* finished = nullptr;
  if (chunks > 1) {
    const int64_t bytes = chunks * static_cast<int64_t>(sizeof(PairSums));
    scratch.emplace(grad, bytes + static_cast<int64_t>(sizeof(unsigned)));
    call.sums = scratch->at<PairSums>(0);
    finished = scratch->at<unsigned>(bytes);
    cuda.zero(finished, sizeof(unsigned));
  }
  dispatch(input_dtype(kLearnableClipBackward, "grad", grad), call.grad, [&](const auto* from) {
    using T = typename Pointee<decltype(from)>::type;
    const bool aligned = is_aligned(from) && is_aligned(call.out);
    cuda.launch(backward_kernel<T>, cuda.blocks(chunks * kWarp, kThreads, kBlocksPerMultiprocessor),
                kThreads, 0, call, chunks, to_low, to_high, finished, aligned);
  });
}

}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CUDA, m) {
  m.impl("_learnable_clip", TORCH_BOX(&pyobserver::learnable_clip));
  m.impl("_learnable_clip_mask", TORCH_BOX(&pyobserver::learnable_clip_mask));
  m.impl("_learnable_clip_backward", TORCH_BOX(&pyobserver::learnable_clip_backward));
}
