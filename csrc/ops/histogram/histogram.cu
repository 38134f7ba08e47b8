// CUDA kernels and glue of histogram and histogram_combine.
//
// The first of two launches counts into the bins of the range so far, in shared memory, and looks
// for values outside. There are none in the steady state: its last block adds the counts, x is read
// once, and the second launch returns at once. Else its last block finds the new range and carries
// the old counts to it, and the second launch counts x again. A small tensor takes both passes in
// one launch of one block, without scratch memory. Counts are added by integer atomics.
#include <algorithm>
#include <cmath>
#include <optional>

#include "../../core/cuda.h"
#include "../../core/device_walk.cuh"
#include "../../core/sums.h"
#include "../log_histogram/keys.cuh"
#include "histogram_glue.h"

namespace pyobserver {
namespace {

using Count = unsigned long long;

constexpr int kThreads = 512;
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int64_t kLeastOfBlock = 8192;  // values
constexpr int64_t kMostOfOneBlock = 32768;

// What the blocks of a call tell each other; all zeros before. Keys of the values outside: the
// complement of the least and the greatest, from zero on.
struct Status {
  Count nonfinite;
  uint32_t low, high;
  unsigned passed[2];
  int32_t again, narrow;  // a second pass, over range; how its counts are rounded
  Range range;
};

// Adds outside values to the status, by one thread of a block.
PYOBS_DEVICE void tell(Status* status, Keys keys, Count nonfinite) {
  constexpr uint32_t kSign = 0x80000000u;
  atomicMax(&status->low, ~(static_cast<uint32_t>(keys.low) ^ kSign));
  atomicMax(&status->high, static_cast<uint32_t>(keys.high) ^ kSign);
  atomicAdd(&status->nonfinite, nonfinite);
}

// Not from a cache: other blocks have written it.
PYOBS_DEVICE Keys keys_told(const volatile Status* status) {
  constexpr uint32_t kSign = 0x80000000u;
  return {static_cast<int32_t>(~status->low ^ kSign), static_cast<int32_t>(status->high ^ kSign)};
}

struct DeviceHistogram {
  double* counts;
  float *low, *high;
  int64_t* nonfinite;
  int32_t bins;
  Combine combine;
  int64_t upsample_rate;
  bool propagate;
  DeviceSwitch enabled;
  int64_t numel, repeat;
  // of the device; null where there is one block, which has them in shared memory
  Status* status;
  Count* totals;
  double *carried, *before;
};

PYOBS_DEVICE bool is_alone(const DeviceHistogram& given) { return given.status == nullptr; }

// The counts of a block, in its shared memory, behind what else it has there.
PYOBS_DEVICE uint32_t* row_of(const DeviceHistogram& given) {
  PYOBS_DYNAMIC_SHARED(uint32_t, shared);
  const int doubles = !is_alone(given) ? 0 : given.combine == Combine::aligned ? 2 : 1;
  return shared + 2 * doubles * given.bins;
}

// The sum of the counts in the order of histogram_table().sum, by each warp for itself.
PYOBS_DEVICE double sum_in_order(const double* counts, int32_t bins) {
  const int lane = threadIdx.x % kWarp;
  const int32_t whole = bins / kSums * kSums;
  double sum = 0.0;
  for (int32_t start = 0; start < whole; start += kWarp) {
    const double mine = start + lane < whole ? counts[start + lane] : 0.0;
    for (int i = 0; i < kWarp; i += kSums) {
      const double value = __shfl_sync(kAllLanes, mine, i + lane % kSums);
      sum += start + i < whole ? value : 0.0;
    }
  }
  for (int32_t i = whole; i < bins; ++i) {
    sum += lane % kSums == 0 ? counts[i] : 0.0;
  }
  double sums[kSums];
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    sums[i] = __shfl_sync(kAllLanes, sum, i);
  }
  return total_of(sums);
}

// Whether sum(counts) + sum(others) + added is within what float32 counts, as sums in order have
// it: those of a tree decide but where it is close. others: may be null.
PYOBS_DEVICE_ONCE bool is_narrow(const double* counts, const double* others, int32_t bins,
                                 double added) {
  const auto plus = [](double a, double b) { return a + b; };
  double sum = 0.0, size = 0.0;
  for (int32_t i = threadIdx.x; i < bins; i += blockDim.x) {
    const double other = others == nullptr ? 0.0 : others[i];
    sum += counts[i] + other;
    size += fabs(counts[i]) + fabs(other);
  }
  sum = reduce_block(sum, 0.0, plus) + added;
  size = reduce_block(size, 0.0, plus) + fabs(added) + kFloat32Counts;
  if (fabs(sum - kFloat32Counts) > size * bins * 0x1p-50) {
    return sum <= kFloat32Counts;
  }
  const double ours = sum_in_order(counts, bins);
  return ours + (others == nullptr ? added : sum_in_order(others, bins)) <= kFloat32Counts;
}

// The counts before each bin, summed from the first on as they are in rebin(): the order decides
// how they are rounded. By one warp, whose lanes hand each other what they have loaded.
PYOBS_DEVICE void sum_before(const double* counts, int32_t bins, double* before) {
  const int lane = threadIdx.x;
  if (lane >= kWarp) {
    return;
  }
  double sum = 0.0;
  for (int32_t start = 0; start < bins; start += kWarp) {
    const double mine = start + lane < bins ? counts[start + lane] : 0.0;
    double of_lane = 0.0;
    for (int i = 0; i < kWarp; ++i) {
      of_lane = i == lane ? sum : of_lane;
      sum += __shfl_sync(kAllLanes, mine, i);
    }
    if (start + lane < bins) {
      before[start + lane] = of_lane;
    }
  }
}

// The counts over old_range carried to new_range, whose high may be relaxed, into out, as rebin()
// does; by a block. before: as many.
PYOBS_DEVICE_ONCE void carry(const double* counts, int32_t bins, Range old_range, Range* new_range,
                             Combine combine, int64_t upsample_rate, bool narrow, double* before,
                             double* out) {
  const int32_t first = threadIdx.x;
  const int32_t step = blockDim.x;
  if (old_range.low == new_range->low && old_range.high == new_range->high) {
    for (int32_t i = first; i < bins; i += step) {
      out[i] = counts[i];
    }
  } else if (old_range.low == old_range.high) {
    const double total = sum_in_order(counts, bins);
    const int32_t at = bin_index(old_range.low, bin_grid(new_range->low, new_range->high, bins));
    for (int32_t i = first; i < bins; i += step) {
      out[i] = i == at ? total : 0.0;
    }
  } else if (combine == Combine::aligned) {
    const AlignedGrid grid = aligned_grid(old_range.low, old_range.high, new_range->low,
                                          new_range->high, bins, upsample_rate);
    new_range->high = grid.high;
    sum_before(counts, bins, before);
    __syncthreads();
    for (int32_t i = first; i < bins; i += step) {
      out[i] = aligned_cumulative(counts, before, bins, upsample_rate, grid, i + 1) -
               aligned_cumulative(counts, before, bins, upsample_rate, grid, i);
    }
  } else {
    const MidpointGrid grid = midpoint_grid(old_range.low, old_range.high, new_range->low,
                                            new_range->high, bins, upsample_rate);
    for (int32_t i = first; i < bins; i += step) {
      const int64_t part = first_part_of(grid, i), end = first_part_of(grid, i + 1);
      out[i] = narrow ? sum_of_parts<float>(counts, upsample_rate, part, end)
                      : sum_of_parts<double>(counts, upsample_rate, part, end);
    }
  }
}

PYOBS_DEVICE double rounded(double sum, bool narrow) {
  return narrow ? static_cast<double>(static_cast<float>(sum)) : sum;
}

// narrow_bin_index() without a division: a quotient from the rounded reciprocal of the width, twice
// corrected by what remains, is the rounded one, if nothing leaves the range of float32 on the way.
struct QuickBins {
  float reciprocal;
  bool serves;
};

PYOBS_DEVICE QuickBins quick_bins(const BinGrid& grid) {
  const bool moderate = grid.width > 0x1p-60f && grid.width < 0x1p60f && grid.bins < (1 << 24);
  return {1.0f / grid.width, moderate && !grid.wide && !grid.unsplit};
}

PYOBS_DEVICE int32_t quick_bin_index(float x, const BinGrid& grid, float reciprocal) {
  const float dividend = (x - grid.left) * static_cast<float>(grid.bins);
  float quotient = dividend * reciprocal;
  quotient = fmaf(fmaf(-quotient, grid.width, dividend), reciprocal, quotient);
  quotient = fmaf(fmaf(-quotient, grid.width, dividend), reciprocal, quotient);
  return clamp_bin(static_cast<int32_t>(quotient), grid.bins);
}

// Counts the values inside a range and looks at the others. In shared memory if in_row, else in the
// totals. The bin of zero, which half of all values may be, is counted behind the row, by each lane
// for itself: in one bin each would wait for the one before.
template <bool in_row, bool quick>
struct BinCounter {
  BinGrid grid;
  float reciprocal;
  Range range;
  Entrance entrance;
  uint32_t* row;
  Count* totals;
  int32_t common;
  Keys outside = no_keys();
  uint32_t nonfinite = 0;

  template <int n>
  PYOBS_MEMBER void add(const float (&values)[n]) {
    bool all = true;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      all &= is_inside(values[i]);
    }
    if (all) {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        count(values[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        if (is_inside(values[i])) {
          count(values[i]);
        } else {
          nonfinite += is_finite(values[i]) ? 0 : 1;
          const auto bits = static_cast<int32_t>(float_to_bits(values[i]));
          outside = merge(outside, keys_of(bits, entrance));
        }
      }
    }
  }

  PYOBS_MEMBER bool is_inside(float value) const {
    return (value >= range.low) & (value <= range.high);
  }

  PYOBS_MEMBER void count(float value) {
    const int32_t index = quick ? quick_bin_index(value, grid, reciprocal) : bin_index(value, grid);
    if (in_row) {
      const int32_t behind = grid.bins + static_cast<int32_t>(threadIdx.x % kWarp);
      atomicAdd(row + (index == common ? behind : index), 1u);
    } else {
      atomicAdd(totals + index, Count{1});
    }
  }
};

// What an ended loop has found, by a block: to its row and to the status, which may be null.
template <bool in_row, bool quick>
PYOBS_DEVICE void end_count(const BinCounter<in_row, quick>& counter, Status* status) {
  const bool some = counter.nonfinite > 0 || counter.outside.low <= counter.outside.high;
  const bool is_any = __syncthreads_or(some) != 0;  // and all is counted
  if (in_row && threadIdx.x < kWarp) {
    atomicAdd(counter.row + counter.common, counter.row[counter.grid.bins + threadIdx.x]);
  }
  if (status != nullptr && is_any) {
    const Keys keys = keys_of_block(counter.outside);
    const uint32_t nonfinite =
        reduce_block(counter.nonfinite, 0u, [](uint32_t a, uint32_t b) { return a + b; });
    if (threadIdx.x == 0) {
      tell(status, keys, nonfinite);
    }
  }
}

template <bool in_row, bool quick>
PYOBS_DEVICE BinCounter<in_row, quick> bin_counter(const DeviceHistogram& given,
                                                   const BinGrid& grid, Range range) {
  const float zero = fminf(fmaxf(0.0f, range.low), range.high);  // or the nearest, NaN if none
  const int32_t common = bin_index(zero == zero ? zero : grid.left, grid);
  return {grid,          quick_bins(grid).reciprocal,
          range,         entrance_of(given.propagate),
          row_of(given), given.totals,
          common};
}

// Any where there is no range, over which nothing is counted.
PYOBS_DEVICE BinGrid grid_of(Range range, int32_t bins) {
  return range.low <= range.high ? bin_grid(range.low, range.high, bins)
                                 : bin_grid(0.0f, 1.0f, bins);
}

// Where quick_bin_index() serves, of a tensor in a row.
template <class T>
PYOBS_DEVICE_ONCE void count_quickly(const T* __restrict__ x, const Cut& cut,
                                     const DeviceHistogram& given, Range range, Status* status) {
  const BinGrid grid = grid_of(range, given.bins);
  auto counter = bin_counter<true, true>(given, grid, range);
  for_each_value<kLoads<T>>(
      x, cut, thread_of_grid(), threads_of_grid(), [](int64_t i) { return i; },
      [&](const auto& values) { counter.add(values); });
  end_count(counter, status);
}

template <class T, bool in_row>
PYOBS_DEVICE_ONCE void count_slowly(const T* __restrict__ x, const DeviceLayout& layout,
                                    const Cut& cut, const DeviceHistogram& given, Range range,
                                    Status* status) {
  const BinGrid grid = grid_of(range, given.bins);
  auto counter = bin_counter<in_row, false>(given, grid, range);
  for_each_value<kScatteredLoads>(
      x, cut, thread_of_grid(), threads_of_grid(), [&](int64_t i) { return place_of(layout, i); },
      [&](const auto& values) { counter.add(values); });
  end_count(counter, status);
}

// Where a block finds what it works on. In shared memory, if it is the only one.
struct Workspace {
  Status* status;
  double *carried, *before;
};

PYOBS_DEVICE Workspace workspace_of(const DeviceHistogram& given, Status* of_block) {
  PYOBS_DYNAMIC_SHARED(double, shared);
  return is_alone(given) ? Workspace{of_block, shared, shared + given.bins}
                         : Workspace{given.status, given.carried, given.before};
}

// The state as the call has found it.
struct Known {
  Range range;
  bool unfed, has_bins;
};

PYOBS_DEVICE Known known_of(const DeviceHistogram& given) {
  const Range range = {*given.low, *given.high};
  const bool unfed = is_unfed(range);
  return {range, unfed, !unfed && is_finite(range.low) && is_finite(range.high)};
}

// counts = carried + what the blocks have counted
PYOBS_DEVICE_ONCE void add_counts(const DeviceHistogram& given, const double* carried,
                                  bool narrow) {
  for (int32_t i = threadIdx.x; i < given.bins; i += blockDim.x) {
    const Count added = is_alone(given) ? row_of(given)[i] : __ldcg(given.totals + i);
    const double sum = carried[i] + static_cast<double>(given.repeat) * static_cast<double>(added);
    given.counts[i] = rounded(sum, narrow);
  }
}

// After the first pass, by the last block.
PYOBS_DEVICE_ONCE void finish_first(const DeviceHistogram& given, Workspace work) {
  const int32_t bins = given.bins;
  const Known known = known_of(given);
  const Keys keys = keys_told(work.status);
  const volatile Status* told = work.status;
  const int64_t nonfinite = given.repeat * static_cast<int64_t>(told->nonfinite);
  const bool steady = known.has_bins && keys.low > keys.high;
  Range next = merge(known.range, range_of(keys));
  // no histogram over a range that is empty or, with "propagate", not finite
  const bool again = !steady && is_finite(next.low) && is_finite(next.high);
  const bool narrow = !known.unfed && is_narrow(given.counts, nullptr, bins,
                                                static_cast<double>(given.numel - nonfinite));
  __syncthreads();  // every warp has summed the counts
  if (steady) {
    add_counts(given, given.counts, narrow);
  } else if (again && !known.unfed) {
    carry(given.counts, bins, known.range, &next, given.combine, given.upsample_rate, narrow,
          work.before, work.carried);
  }
  for (int32_t i = threadIdx.x; again && i < bins; i += blockDim.x) {
    if (known.unfed) {
      work.carried[i] = 0.0;
    }
    if (!is_alone(given)) {
      given.totals[i] = 0;
    }
  }
  __syncthreads();  // the state has been read
  if (threadIdx.x == 0) {
    work.status->again = again;
    work.status->narrow = narrow;
    work.status->range = next;
    *given.low = next.low;
    *given.high = next.high;
    *given.nonfinite += nonfinite;
  }
  __syncthreads();
}

// The passes from `first` on, to `last`.
template <class T, bool in_row>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    histogram_passes(const T* __restrict__ x, const __grid_constant__ DeviceHistogram given,
                     const __grid_constant__ DeviceLayout layout, const __grid_constant__ Cut cut,
                     int first, int last) {
  if (is_off(given.enabled)) {
    return;
  }
  __shared__ Status of_block;
  const Workspace work = workspace_of(given, &of_block);
  uint32_t* row = row_of(given);
  if (threadIdx.x == 0) {
    of_block = {};
  }
  const int32_t bins = given.bins;

#pragma unroll 1
  for (int pass = first; pass <= last; ++pass) {
    Range range = {__builtin_nanf(""), __builtin_nanf("")};
    if (pass == 1) {
      if (work.status->again == 0) {
        return;
      }
      range = work.status->range;
    } else if (known_of(given).has_bins) {
      range = known_of(given).range;
    }
    for (int32_t i = threadIdx.x; in_row && i < bins + kWarp; i += blockDim.x) {
      row[i] = 0;
    }
    __syncthreads();  // the row is zero, and so is the status of a block
    Status* told = pass == 0 ? work.status : nullptr;
    if (in_row && layout.dense && quick_bins(grid_of(range, bins)).serves) {
      count_quickly(x, cut, given, range, told);
    } else {
      count_slowly<T, in_row>(x, layout, cut, given, range, told);
    }
    __syncthreads();  // the row is complete, and all is told
    if (!is_alone(given)) {
      for (int32_t i = threadIdx.x; in_row && i < bins; i += blockDim.x) {
        if (row[i] > 0) {
          atomicAdd(given.totals + i, Count{row[i]});
        }
      }
      if (!is_last_block(&work.status->passed[pass], gridDim.x)) {
        return;
      }
    }
    if (pass == 0) {
      finish_first(given, work);
    } else {
      add_counts(given, work.carried, work.status->narrow != 0);
    }
  }
}

void histogram(const Tensor& x, const Tensor& counts, const Tensor& min_val, const Tensor& max_val,
               const Tensor& nonfinite_count, int64_t combine_mode, int64_t upsample_rate,
               int64_t nonfinite_mode, std::optional<Tensor> enabled) {
  const HistogramArgs args = parse_histogram(x, counts, min_val, max_val, nonfinite_count,
                                             combine_mode, upsample_rate, nonfinite_mode);
  const DeviceSwitch on = device_switch(kHistogram, "enabled", enabled, x);
  if (x.numel() == 0) {
    return;
  }
  const CudaContext cuda(kHistogram, x);
  if (args.nonfinite == Nonfinite::raise) {
    check_finite_on_device(kHistogram, cuda, args.dtype, x, on);
  }
  const Walk walk(kHistogram, x, {});
  const DeviceLayout& layout = walk.layout;
  const int64_t bins = counts.numel();
  DeviceHistogram given = {};
  given.counts = mutable_data<double>(counts);
  given.low = mutable_data<float>(min_val);
  given.high = mutable_data<float>(max_val);
  given.nonfinite = mutable_data<int64_t>(nonfinite_count);
  given.bins = static_cast<int32_t>(bins);
  given.combine = args.combine;
  given.upsample_rate = upsample_rate;
  given.propagate = args.nonfinite == Nonfinite::propagate;
  given.enabled = on;
  given.numel = x.numel();
  given.repeat = layout.repeat;

  const int64_t rows = args.combine == Combine::aligned ? 2 : 1;
  const int64_t row_bytes = (bins + kWarp) * static_cast<int64_t>(sizeof(uint32_t));
  const int64_t carried_bytes = rows * bins * static_cast<int64_t>(sizeof(double));
  const bool alone = layout.numel <= kMostOfOneBlock && cuda.fits(carried_bytes + row_bytes);
  std::optional<DeviceScratch> scratch;
  if (!alone) {
    const int64_t zeros = static_cast<int64_t>(sizeof(Status)) + bins * 8;
    scratch.emplace(x, zeros + carried_bytes);
    given.status = scratch->at<Status>(0);
    given.totals = scratch->at<Count>(sizeof(Status));
    given.carried = scratch->at<double>(zeros);
    given.before = given.carried + bins;
    cuda.zero(given.status, zeros);
  }
  const bool in_row = alone || cuda.fits(row_bytes);
  const int64_t shared_bytes = (in_row ? row_bytes : 0) + (alone ? carried_bytes : 0);
  const int per_multiprocessor = cuda.blocks_that_fit(shared_bytes, kBlocksPerMultiprocessor);
  const unsigned blocks =
      alone ? 1
            : counting_blocks(layout.numel,
                              cuda.blocks(layout.numel, kLeastOfBlock, per_multiprocessor));
  dispatch(args.dtype, walk.x.const_data_ptr(), [&](const auto* data) {
    using T = typename Pointee<decltype(data)>::type;
    const auto kernel = in_row ? histogram_passes<T, true> : histogram_passes<T, false>;
    const Cut cut = cut_for_packs(data, layout.numel, layout.dense);
    for (int pass = 0; pass < (alone ? 1 : 2); ++pass) {
      cuda.launch(kernel, blocks, kThreads, shared_bytes, data, given, layout, cut, pass,
                  alone ? 1 : pass);
    }
  });
}

struct DevicePair {
  double* counts;
  float *low, *high;
  const double* others;
  const float *other_low, *other_high;
  int32_t bins;
  Combine combine;
  int64_t upsample_rate;
  double *carried, *others_carried, *before;
};

__global__ void __launch_bounds__(kThreads) combine_kernel(DevicePair pair) {
  const Range state = {*pair.low, *pair.high};
  const Range other = {*pair.other_low, *pair.other_high};
  const int32_t bins = pair.bins;
  if (is_empty(other)) {
    return;
  }
  Range range = merge(state, other);
  const bool counts = is_finite(range.low) && is_finite(range.high);
  if (counts) {
    const bool narrow = is_narrow(pair.counts, pair.others, bins, 0.0);
    const bool fed = !is_empty(state);
    if (fed) {
      carry(pair.counts, bins, state, &range, pair.combine, pair.upsample_rate, narrow, pair.before,
            pair.carried);
    }
    // the first has settled the range; the other follows by its midpoints
    carry(pair.others, bins, other, &range, Combine::midpoint, pair.upsample_rate, narrow, nullptr,
          pair.others_carried);
    __syncthreads();  // all counts have been read
    for (int32_t i = threadIdx.x; i < bins; i += blockDim.x) {
      const double carried = fed ? pair.carried[i] : 0.0;
      pair.counts[i] = rounded(carried + pair.others_carried[i], narrow);
    }
  }
  __syncthreads();  // the ranges have been read
  if (threadIdx.x == 0) {
    *pair.low = range.low;
    *pair.high = range.high;
  }
}

void histogram_combine(const Tensor& counts, const Tensor& min_val, const Tensor& max_val,
                       const Tensor& other_counts, const Tensor& other_min_val,
                       const Tensor& other_max_val, int64_t combine_mode, int64_t upsample_rate) {
  const Combine combine =
      parse_histogram_combine(counts, min_val, max_val, other_counts, other_min_val, other_max_val,
                              combine_mode, upsample_rate);
  const CudaContext cuda(kHistogramCombine, counts);
  const int64_t bins = counts.numel();
  const DeviceScratch scratch(counts, 3 * bins * static_cast<int64_t>(sizeof(double)));
  auto* carried = scratch.at<double>(0);
  const DevicePair pair = {mutable_data<double>(counts),
                           mutable_data<float>(min_val),
                           mutable_data<float>(max_val),
                           const_data<double>(other_counts),
                           const_data<float>(other_min_val),
                           const_data<float>(other_max_val),
                           static_cast<int32_t>(bins),
                           combine,
                           upsample_rate,
                           carried,
                           carried + bins,
                           carried + 2 * bins};
  cuda.launch(combine_kernel, 1, kThreads, 0, pair);
}

}  // namespace
}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CUDA, m) {
  m.impl("histogram", TORCH_BOX(&pyobserver::histogram));
  m.impl("histogram_combine", TORCH_BOX(&pyobserver::histogram_combine));
}
