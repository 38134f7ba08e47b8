// The sums of lane_sums.h on a device.
#pragma once

#include "device.cuh"
#include "lane_sums.h"

namespace pyobserver {

constexpr int kFlight = kLanes / kWarp;  // lanes of a thread, where a warp has all

PYOBS_DEVICE PairSums plus(const PairSums& a, const PairSums& b) {
  return {a.first + b.first, a.second + b.second};
}

// The lanes of `width` threads next to each other, a power of two, added up as a tree does: sums[r
// * row + j] is lane r * row * width + t * row + j of thread t. All threads of a warp call it; the
// first of the `width` gets the sum.
template <int row = 1>
PYOBS_DEVICE PairSums fold_lanes(PairSums (&sums)[kFlight], int width) {
#pragma unroll
  for (int half = kFlight / 2; half >= row; half /= 2) {
#pragma unroll
    for (int s = 0; s < half; ++s) {
      sums[s] = plus(sums[s], sums[s + half]);
    }
  }
  for (int half = width / 2; half > 0; half /= 2) {
#pragma unroll
    for (int s = 0; s < row; ++s) {
      sums[s] = plus(sums[s], {__shfl_down_sync(kAllLanes, sums[s].first, half),
                               __shfl_down_sync(kAllLanes, sums[s].second, half)});
    }
  }
#pragma unroll
  for (int half = row / 2; half > 0; half /= 2) {
#pragma unroll
    for (int s = 0; s < half; ++s) {
      sums[s] = plus(sums[s], sums[s + half]);
    }
  }
  return sums[0];
}

// Terms [begin, end), as `width` threads next to each other sum them, this one the lane-th: all
// at once where width is less than a warp. load(e) gives what term makes a term of. Called as
// fold_lanes. in_flight: all loads before the first term; else the code is small, and the sums of a
// thread lie in local memory.
template <bool in_flight, class Load, class Term>
PYOBS_DEVICE PairSums sum_lanes(int width, int lane, int64_t begin, int64_t end, const Load& load,
                                const Term& term) {
  PairSums sums[kFlight] = {};
  const int64_t rows = int64_t{kFlight} * width;
  if constexpr (in_flight) {
    for (int64_t row = begin + lane; row < end; row += rows) {
      decltype(load(row)) loaded[kFlight];
#pragma unroll
      for (int s = 0; s < kFlight; ++s) {
        const int64_t e = row + s * width;
        loaded[s] = load(e < end ? e : begin);
      }
#pragma unroll
      for (int s = 0; s < kFlight; ++s) {
        if (row + s * width < end) {
          sums[s] = plus(sums[s], term(loaded[s]));
        }
      }
    }
  } else {
#pragma unroll 1
    for (int s = 0; s < kFlight; ++s) {
      for (int64_t e = begin + lane + s * width; e < end; e += rows) {
        sums[s] = plus(sums[s], term(load(e)));
      }
    }
  }
  return fold_lanes(sums, width);
}

PYOBS_DEVICE PairSums load_sums(const PairSums* sums) {
  return {__ldcg(&sums->first), __ldcg(&sums->second)};
}

// Of chunks, by a block of kLanes threads, all of which call it; its first thread gets the sum.
PYOBS_DEVICE PairSums sum_by_block(const PairSums* sums, int64_t chunks) {
  __shared__ PairSums lanes[kLanes];
  PairSums sum = {0.0, 0.0};
#pragma unroll 4
  for (int64_t k = threadIdx.x; k < chunks; k += kLanes) {
    sum = plus(sum, load_sums(sums + k));
  }
  lanes[threadIdx.x] = sum;
  __syncthreads();
  PairSums own[kFlight];
#pragma unroll
  for (int s = 0; s < kFlight; ++s) {
    own[s] = lanes[s * kWarp + threadIdx.x % kWarp];
  }
  return fold_lanes(own, kWarp);
}

// What the last block of a grid of blocks of kLanes threads does: adds the sums of the chunks of
// each group, which lie in a row, and calls write(group, total) in one thread. finished: how many
// blocks are through.
template <class Write>
PYOBS_DEVICE void finish_sums(const PairSums* sums, int64_t groups, int64_t chunks,
                              unsigned* finished, const Write& write) {
  if (chunks == 1 || !is_last_block(finished, gridDim.x)) {
    return;
  }
  if (groups == 1) {
    const PairSums total = sum_by_block(sums, chunks);
    if (threadIdx.x == 0) {
      write(0, total);
    }
    return;
  }
  for (int64_t group = threadIdx.x / kWarp; group < groups; group += kLanes / kWarp) {
    const PairSums* own = sums + group * chunks;
    const PairSums total = sum_lanes<true>(
        kWarp, threadIdx.x % kWarp, 0, chunks, [&](int64_t k) { return load_sums(own + k); },
        [](const PairSums& chunk) { return chunk; });
    if (threadIdx.x % kWarp == 0) {
      write(group, total);
    }
  }
}

}  // namespace pyobserver
