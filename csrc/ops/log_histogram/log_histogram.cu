// CUDA kernels and glue of log_histogram: x is read once, in one launch, without scratch memory.
//
// Where a group has many values, a block takes a part of them, with a row of 32-bit counts in
// shared memory (k = 5: 65 KB), and adds those that are not zero to the state. Elsewhere, and where
// a row does not fit, a warp adds to the state itself, equal columns at once. Integer atomics
// alone; ranges are merged by compare-and-swap: merge() is the same in any order.
#include <algorithm>
#include <optional>
#include <vector>

#include "../../core/cuda.h"
#include "../../core/device_walk.cuh"
#include "keys.cuh"
#include "log_histogram_glue.h"

namespace pyobserver {
namespace {

using Count = unsigned long long;  // what atomics add to an int64_t

struct DeviceLogState {
  Count* counts;
  float *lows, *highs;
  Count repeat;
  LogBins bins;
  bool propagate;
  DeviceSwitch enabled;
};

PYOBS_DEVICE void merge_into(const DeviceLogState& state, int64_t group, Keys keys) {
  const Range found = range_of(keys);
  change(state.lows + group, [&](float low) { return merge(Range{low, 0.0f}, found).low; });
  change(state.highs + group, [&](float high) { return merge(Range{0.0f, high}, found).high; });
}

// Counts values of one group into a row of the block. Zeros, which half of all may be, are counted
// behind it, by each lane for itself: in one column each would wait for the one before.
struct RowCounter {
  LogBins bins;
  Entrance entrance;
  uint32_t* row;
  int32_t zeros;  // column for them
  Keys keys = no_keys();

  template <int n>
  PYOBS_MEMBER void add(const float (&values)[n]) {
    int32_t bits[n];
    Keys plain = no_keys();
#pragma unroll
    for (int i = 0; i < n; ++i) {
      bits[i] = static_cast<int32_t>(float_to_bits(values[i]));
      const int32_t key = key_of_bits(bits[i]);
      plain = merge(plain, {key, key});
    }
    if (are_finite(plain)) {
      keys = merge(keys, plain);
#pragma unroll
      for (int i = 0; i < n; ++i) {
        add(finite_column(key_of_bits(bits[i]), bins));
      }
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        keys = merge(keys, keys_of(bits[i], entrance));
        add(column_of(bits[i], bins));
      }
    }
  }

  PYOBS_MEMBER void add(int32_t column) {
    atomicAdd(row + (column == bins.greatest + 1 ? zeros : column), 1u);
  }
};

constexpr int kRowThreads = 512;
constexpr int kMostRowThreads = 1024;
constexpr int64_t kLeastOfPart = 8192;  // values

// A unit of work is a part of a group; neighbours are parts of different groups, whose elements may
// lie in each other's cache lines. in_row: of a single group, whose elements lie in a row.
template <class T, bool in_row>
__global__ void __launch_bounds__(kMostRowThreads)
    count_in_rows(const T* __restrict__ x, DeviceLogState state, DeviceLayout layout, Cut cut,
                  RunDivisor by_inner, int64_t parts) {
  PYOBS_DYNAMIC_SHARED(uint32_t, row);
  if (is_off(state.enabled)) {
    return;
  }
  const int columns = static_cast<int>(columns_of(state.bins));
  for (int i = threadIdx.x; i < columns + kWarp; i += blockDim.x) {
    row[i] = 0;
  }
  for (int64_t unit = blockIdx.x; unit < layout.groups * parts; unit += gridDim.x) {
    const int64_t group = unit % layout.groups;
    const int64_t part = unit / layout.groups;
    const int64_t thread = part * blockDim.x + threadIdx.x;
    const int zeros = columns + threadIdx.x % kWarp;
    RowCounter counter = {state.bins, entrance_of(state.propagate), row, zeros};
    const auto count = [&](const auto& values) { counter.add(values); };
    __syncthreads();  // the row is zero
    if constexpr (in_row) {
      for_each_value<kLoads<T>>(
          x, cut, thread, parts * blockDim.x, [](int64_t i) { return i; }, count);
    } else {
      const int64_t first = first_of_group(layout, group);
      for_each_value<kScatteredLoads>(
          x, cut, thread, parts * blockDim.x,
          [&](int64_t i) {
            const int64_t run = by_inner.divide(i);
            return place_of(layout, first + offset_of_run(layout, run) + i - run * layout.inner);
          },
          count);
    }
    const Keys keys = keys_of_block(counter.keys);
    if (threadIdx.x == 0) {
      merge_into(state, group, keys);
    }
    __syncthreads();  // all is counted
    if (threadIdx.x < kWarp) {
      atomicAdd(row + state.bins.greatest + 1, row[zeros]);
      row[zeros] = 0;
    }
    __syncthreads();
    Count* counts = state.counts + group * columns;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
      if (row[i] > 0) {
        atomicAdd(counts + i, row[i] * state.repeat);
        row[i] = 0;
      }
    }
  }
}

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 8;

// By whole warps: a lane that has no element takes the last one, and adds nothing.
template <class T>
__global__ void __launch_bounds__(kThreads)
    count_in_state(const T* __restrict__ x, DeviceLogState state, DeviceLayout layout) {
  if (is_off(state.enabled)) {
    return;
  }
  constexpr int kInFlight = 4;
  const Entrance entrance = entrance_of(state.propagate);
  const int64_t columns = columns_of(state.bins);
  const int64_t threads = threads_of_grid();
  const int64_t end = (layout.numel + kWarp - 1) / kWarp * kWarp;
  Keys of_thread = no_keys();
  for (int64_t start = thread_of_grid(); start < end; start += kInFlight * threads) {
    float values[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t i = start + k * threads;
      values[k] = i < layout.numel ? to_float(x[place_of(layout, i)]) : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t i = start + k * threads;
      if (i >= end) {
        break;
      }
      const bool some = i < layout.numel;
      const int64_t group = group_of(layout, some ? i : layout.numel - 1);
      const auto bits = static_cast<int32_t>(float_to_bits(values[k]));
      const int64_t cell = some ? group * columns + column_of(bits, state.bins) : -1;
      const uint32_t equal = __match_any_sync(kAllLanes, cell);
      if (some && is_first_of(equal)) {
        atomicAdd(state.counts + cell, __popc(equal) * state.repeat);
      }
      const Keys keys = some ? keys_of(bits, entrance) : no_keys();
      if (layout.groups == 1) {
        of_thread = merge(of_thread, keys);
        continue;
      }
      const uint32_t peers = __match_any_sync(kAllLanes, group);
      Keys of_peers = keys;
      if (__popc(peers) > 1) {
        of_peers = {__reduce_min_sync(peers, keys.low), __reduce_max_sync(peers, keys.high)};
      }
      if (is_first_of(peers)) {
        merge_into(state, group, of_peers);
      }
    }
  }
  if (layout.groups == 1) {
    const Keys keys = keys_of_block(of_thread);
    if (threadIdx.x == 0) {
      merge_into(state, 0, keys);
    }
  }
}

// Whether rows in shared memory are worth their zeros and what is added of them: not for a tensor
// that few blocks would share, nor for groups with few values for a column.
bool takes_rows(const DeviceLayout& layout, int64_t columns) {
  const int64_t values = layout.numel / layout.groups;
  return layout.groups == 1 ? values >= 4 * kLeastOfPart && values >= columns
                            : values >= 1024 && values >= columns / 8;
}

template <class T>
void count_on_device(const CudaContext& cuda, const T* x, const DeviceLogState& state,
                     const DeviceLayout& layout) {
  const int64_t columns = columns_of(state.bins);
  const int64_t shared_bytes = (columns + kWarp) * static_cast<int64_t>(sizeof(uint32_t));
  const int64_t values = layout.numel / layout.groups;
  if (!cuda.fits(shared_bytes) || !takes_rows(layout, columns)) {
    const unsigned blocks = cuda.blocks(layout.numel, 4 * kThreads, kBlocksPerMultiprocessor);
    cuda.launch(count_in_state<T>, blocks, kThreads, 0, x, state, layout);
    return;
  }
  const int per_multiprocessor = cuda.blocks_that_fit(shared_bytes, 3);
  const int threads = per_multiprocessor == 1 ? kMostRowThreads : kRowThreads;
  const int64_t most = cuda.blocks(layout.numel, 1, per_multiprocessor);
  // of several groups more parts than blocks, so that these end together
  const int64_t wanted = layout.groups == 1 ? most : 2 * most / layout.groups + 1;
  const int64_t parts = counting_blocks(
      values, static_cast<unsigned>(std::max<int64_t>(1, std::min(wanted, values / kLeastOfPart))));
  const bool in_row = layout.dense && layout.groups == 1;
  const bool whole_packs = layout.dense && layout.inner % Pack<T>::size == 0 && is_aligned(x);
  const auto blocks = static_cast<unsigned>(std::min(parts * layout.groups, most));
  cuda.launch(in_row ? count_in_rows<T, true> : count_in_rows<T, false>, blocks, threads,
              shared_bytes, x, state, layout, cut_for_packs(x, values, in_row || whole_packs),
              RunDivisor(layout.inner, values), parts);
}

void log_histogram(const Tensor& x, const Tensor& counts, const Tensor& min_val,
                   const Tensor& max_val, std::optional<int64_t> axis, int64_t nonfinite_mode,
                   std::optional<Tensor> enabled, std::optional<std::vector<int64_t>> block_size) {
  const LogHistogramArgs args =
      parse_log_histogram(x, counts, min_val, max_val, axis, nonfinite_mode, block_size);
  const DeviceSwitch on = device_switch(kLogHistogram, "enabled", enabled, x);
  if (x.numel() == 0) {
    return;
  }
  const CudaContext cuda(kLogHistogram, x);
  if (args.nonfinite == Nonfinite::raise) {
    check_finite_on_device(kLogHistogram, cuda, args.dtype, x, on);
  }
  const Walk walk(kLogHistogram, x, args.grouping);
  const DeviceLogState state = {reinterpret_cast<Count*>(mutable_data<int64_t>(counts)),
                                mutable_data<float>(min_val),
                                mutable_data<float>(max_val),
                                static_cast<Count>(walk.layout.repeat),
                                args.bins,
                                args.nonfinite == Nonfinite::propagate,
                                on};
  dispatch(args.dtype, walk.x.const_data_ptr(),
           [&](const auto* data) { count_on_device(cuda, data, state, walk.layout); });
}

}  // namespace
}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CUDA, m) {
  m.impl("log_histogram", TORCH_BOX(&pyobserver::log_histogram));
}
