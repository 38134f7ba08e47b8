// CUDA kernel and glue of range_search: one launch, a block for each histogram, read once.
//
// One thread draws the range in, and the whole block takes the error of each step, a thread a bin;
// eight threads add it in the order of the CPU. Cumulative counts are added one by one. All that is
// kept of a histogram is 13 bytes a bin, in shared memory up to some 17 thousand bins.
//
// The total of up to 16384 counts is their sum rounded once. The CPU's is torch's float32 sum,
// which is the same for counts that are integers up to 2^24 in sum, and else may differ in its last
// bit.
#include <tuple>

#include "../../core/cuda.h"
#include "../../core/sums.h"
#include "range_search_glue.h"

namespace pyobserver {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 4;
constexpr int32_t kRow = kSums;  // bins whose errors go to the sums in turn

// What a block keeps of a histogram. A row is eight bins, or one of those that are left; those with
// counts have their numbers in `rows`.
struct Room {
  float *cumulative, *density, *errors;
  int32_t* rows;
};

PYOBS_HD int32_t row_count(int32_t bins) { return bins / kRow + bins % kRow; }

PYOBS_HD int64_t room_bytes(int32_t bins) {
  return 4 * (2 * int64_t{bins} + (kRow + 1) * int64_t{row_count(bins)});
}

PYOBS_DEVICE Room room_of(unsigned char* memory, int32_t bins) {
  auto* floats = reinterpret_cast<float*>(memory);
  float* errors = floats + 2 * int64_t{bins};
  const int64_t most_errors = kRow * int64_t{row_count(bins)};
  return {floats, floats + bins, errors, reinterpret_cast<int32_t*>(errors + most_errors)};
}

struct RowBins {
  int32_t first, size;
};

PYOBS_DEVICE RowBins bins_of(int32_t row, int32_t bins) {
  const int32_t whole = bins / kRow;
  return row < whole ? RowBins{row * kRow, kRow} : RowBins{whole * kRow + (row - whole), 1};
}

// By one thread: sums of doubles, rounded.
PYOBS_DEVICE void accumulate(float* counts, int32_t bins) {
  constexpr int32_t kAtOnce = 8;  // loads, which do not wait for each other
  double running = 0.0;
  for (int32_t begin = 0; begin < bins; begin += kAtOnce) {
    float loaded[kAtOnce];
#pragma unroll
    for (int32_t i = 0; i < kAtOnce; ++i) {
      loaded[i] = begin + i < bins ? counts[begin + i] : 0.0f;
    }
#pragma unroll
    for (int32_t i = 0; i < kAtOnce; ++i) {
      running += static_cast<double>(loaded[i]);
      if (begin + i < bins) {
        counts[begin + i] = static_cast<float>(running);
      }
    }
  }
}

// By one warp: the rows with counts, in order. Returns how many.
PYOBS_DEVICE int32_t find_rows(const float* density, int32_t bins, int32_t* rows) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x % kWarp);
  const int32_t all = row_count(bins);
  int32_t size = 0;
  for (int32_t begin = 0; begin < all; begin += kWarp) {
    uint32_t any = 0;
    if (begin + lane < all) {
      const RowBins row = bins_of(begin + lane, bins);
      for (int32_t i = 0; i < row.size; ++i) {
        any |= float_to_bits(density[row.first + i]);
      }
    }
    const uint32_t found = __ballot_sync(kAllLanes, any != 0);
    if (any != 0) {
      rows[size + __popc(found & ((1u << lane) - 1))] = begin + lane;
    }
    size += __popc(found);
  }
  return size;
}

// By one thread: the sum of so many counts as they are, in their order.
PYOBS_DEVICE double sum_in_order(const double* counts, int32_t bins) {
  double total = 0.0;
#pragma unroll 8
  for (int32_t bin = 0; bin < bins; ++bin) {
    total += counts[bin];
  }
  return total;
}

struct Filled {
  int32_t rows;
  double total;
};

// Fills all of the room but the errors.
PYOBS_DEVICE Filled fill(const double* counts, int32_t bins, float bin_width, const Room& room) {
  __shared__ Filled filled;
  for (int32_t bin = static_cast<int32_t>(threadIdx.x); bin < bins; bin += kThreads) {
    const float narrow = static_cast<float>(counts[bin]);
    room.cumulative[bin] = narrow;
    room.density[bin] = narrow / bin_width;
  }
  __syncthreads();
  const bool narrow_total = bins <= kMostBinsForTorchSum;
  if (threadIdx.x == 0) {
    accumulate(room.cumulative, bins);
    if (narrow_total) {
      filled.total = static_cast<double>(room.cumulative[bins - 1]);
    }
  } else if (threadIdx.x / kWarp == 1) {
    const int32_t rows = find_rows(room.density, bins, room.rows);
    if (threadIdx.x % kWarp == 0) {
      filled.rows = rows;
    }
  } else if (threadIdx.x == 2 * kWarp && !narrow_total) {
    filled.total = sum_in_order(counts, bins);
  }
  __syncthreads();
  return filled;
}

template <class Levels>
PYOBS_DEVICE void bin_errors(const Room& room, int32_t rows, int32_t bins,
                             const ErrorParams& params) {
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < rows * kRow; i += kThreads) {
    const RowBins row = bins_of(room.rows[i / kRow], bins);
    const int32_t bin = row.first + i % kRow;
    room.errors[i] = i % kRow < row.size ? bin_error<Levels>(bin, room.density[bin], params) : 0.0f;
  }
}

// By one warp, whose first lane gets the sum in the order of total_of.
PYOBS_DEVICE double sum_errors(const float* errors, int32_t rows) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x % kWarp);
  double sum = 0.0;
  if (lane < kRow) {
#pragma unroll 8
    for (int32_t row = 0; row < rows; ++row) {
      sum += static_cast<double>(errors[row * kRow + lane]);
    }
  }
  for (int bits = 1; bits < kSums; bits *= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, bits);
  }
  return sum;
}

// What is to be tried next, as the first thread says to the others.
struct Step {
  bool more;
  ErrorParams params;
};

// The bins kept, for the first thread.
PYOBS_DEVICE BinSpan greedy_l2(const Room& room, const Filled& filled, int32_t bins,
                               double bin_width, int64_t num_levels) {
  __shared__ Step step;
  GreedySearch search = start_search(room.cumulative, bins, filled.total);
  BinSpan next = search.span;
  bool better = true;
  for (;;) {
    if (threadIdx.x == 0) {
      step.more = better && next_span(&search, &next);
      step.params = error_params(bin_width, next, num_levels);
    }
    __syncthreads();
    if (!step.more) {
      return search.span;
    }
    if (num_levels > kFewLevels) {
      bin_errors<Many>(room, filled.rows, bins, step.params);
    } else {
      bin_errors<Few>(room, filled.rows, bins, step.params);
    }
    __syncthreads();
    if (threadIdx.x < kWarp) {
      const double error = sum_errors(room.errors, filled.rows);
      if (threadIdx.x == 0) {
        better = keep_span(&search, next, error);
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    range_search_kernel(RangeSearchArgs args, int64_t num_levels, DeviceSwitch enabled,
                        MemoryOfBlocks memory, float* new_lows, float* new_highs) {
  const int32_t bins = args.bins;
  const Room room = room_of(memory_of_block(memory), bins);
  const bool off = is_off(enabled);
  for (int64_t i = blockIdx.x; i < args.histograms; i += gridDim.x) {
    FloatRange range = {args.lows[i], args.highs[i]};
    if (!off && is_searchable(range, 1.0)) {
      int exponent = 0;
      // scaling by a power of two changes no decision, and keeps the cubes inside float32
      const double bin_width = __builtin_frexp(bin_width_of(range, bins), &exponent);
      const Filled filled = fill(args.counts + i * bins, bins, static_cast<float>(bin_width), room);
      if (filled.total > 0.0) {
        range = range_of(range, bins, greedy_l2(room, filled, bins, bin_width, num_levels));
      }
    }
    if (threadIdx.x == 0) {
      new_lows[i] = range.low;
      new_highs[i] = range.high;
    }
    __syncthreads();  // the room is free again
  }
}

std::tuple<Tensor, Tensor> range_search(const Tensor& counts, const Tensor& min_val,
                                        const Tensor& max_val, int64_t num_levels,
                                        std::optional<Tensor> enabled) {
  const RangeSearchArgs args = parse_range_search(counts, min_val, max_val, num_levels);
  const DeviceSwitch flag = device_switch(kRangeSearch, "enabled", enabled, counts);
  const Tensor new_min = empty_output(min_val, true);
  const Tensor new_max = empty_output(max_val, true);
  if (args.histograms == 0) {
    return {new_min, new_max};
  }
  const CudaContext cuda(kRangeSearch, counts);
  const unsigned blocks = cuda.blocks(args.histograms, 1, kBlocksPerMultiprocessor);
  const BlockMemory memory(cuda, counts, room_bytes(args.bins), blocks);
  cuda.launch(range_search_kernel, blocks, kThreads, memory.shared_bytes(), args, num_levels, flag,
              memory.of_blocks(), mutable_data<float>(new_min), mutable_data<float>(new_max));
  return {new_min, new_max};
}

}  // namespace
}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CUDA, m) {
  m.impl("range_search", TORCH_BOX(&pyobserver::range_search));
}
