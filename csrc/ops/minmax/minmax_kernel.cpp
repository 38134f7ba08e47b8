// CPU body of minmax, compiled once per instruction set.
#include "minmax.h"

namespace pyobserver::PYOBS_ISA {
namespace {

// Independent minima, so that the loop vectorizes: many for a long run, few for a short one.
constexpr int kLanes = 64;
constexpr int kShortLanes = 16;
constexpr int64_t kLongRun = 1024;

template <bool finite_only>
PYOBS_HD void merge_value(float value, float* low, float* high, int32_t* nonfinite) {
  const bool finite = is_finite(value);
  *nonfinite += !finite;
  if (finite_only) {
    const float up = finite ? value : __builtin_huge_valf();
    const float down = finite ? value : -__builtin_huge_valf();
    *low = up < *low ? up : *low;
    *high = down > *high ? down : *high;
  } else {
    *low = (value < *low) | (value != value) ? value : *low;
    *high = (value > *high) | (value != value) ? value : *high;
  }
}

template <class T, bool finite_only, int lanes>
int64_t run(const T* x, int64_t n, Range* range) {
  float low[lanes], high[lanes];
  int32_t nonfinite[lanes];
  int64_t total = 0;
  for (int lane = 0; lane < lanes; ++lane) {
    low[lane] = range->low;
    high[lane] = range->high;
    nonfinite[lane] = 0;
  }
  constexpr int64_t kBlock = int64_t{lanes} << 20;  // a lane counts to 2^20 before it is emptied
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = n - start < kBlock ? n : start + kBlock;
    int64_t i = start;
    for (; i + lanes <= end; i += lanes) {
#pragma GCC unroll 4
      for (int lane = 0; lane < lanes; ++lane) {
        merge_value<finite_only>(to_float(x[i + lane]), &low[lane], &high[lane], &nonfinite[lane]);
      }
    }
    for (; i < end; ++i) {
      merge_value<finite_only>(to_float(x[i]), &low[0], &high[0], &nonfinite[0]);
    }
    for (int lane = 0; lane < lanes; ++lane) {
      total += nonfinite[lane];
      nonfinite[lane] = 0;
    }
  }
  for (int lane = 0; lane < lanes; ++lane) {
    *range = merge(*range, {low[lane], high[lane]});
  }
  return total;
}

template <class T, bool finite_only>
int64_t tensor(const T* x, int64_t n, Range* range) {
  return n < kLongRun ? run<T, finite_only, kShortLanes>(x, n, range)
                      : run<T, finite_only, kLanes>(x, n, range);
}

template <class T, bool finite_only>
int64_t channels(const T* __restrict x, int64_t outer, int64_t channels, int64_t inner,
                 int64_t first, int64_t last, float* __restrict lows, float* __restrict highs) {
  int64_t total = 0;
  for (int64_t o = 0; o < outer; ++o) {
    const T* __restrict row = x + o * channels * inner;
    int32_t nonfinite = 0;
    if (inner == 1) {
      for (int64_t c = first; c < last; ++c) {
        merge_value<finite_only>(to_float(row[c]), &lows[c], &highs[c], &nonfinite);
      }
    } else {
      for (int64_t c = first; c < last; ++c) {
        Range range = {lows[c], highs[c]};
        if (inner >= kShortLanes) {
          total += tensor<T, finite_only>(row + c * inner, inner, &range);
        } else {
          int32_t of_channel = 0;
          for (int64_t i = 0; i < inner; ++i) {
            merge_value<finite_only>(to_float(row[c * inner + i]), &range.low, &range.high,
                                     &of_channel);
          }
          total += of_channel;
        }
        lows[c] = range.low;
        highs[c] = range.high;
      }
    }
    total += nonfinite;
  }
  return total;
}

int64_t tensor_any(DType dtype, const void* x, int64_t n, bool finite_only, Range* range) {
  return dispatch(dtype, x, [&](const auto* typed) {
    using T = typename Pointee<decltype(typed)>::type;
    return finite_only ? tensor<T, true>(typed, n, range) : tensor<T, false>(typed, n, range);
  });
}

int64_t channels_any(DType dtype, const void* x, int64_t outer, int64_t count, int64_t inner,
                     int64_t first, int64_t last, bool finite_only, float* lows, float* highs) {
  return dispatch(dtype, x, [&](const auto* typed) {
    using T = typename Pointee<decltype(typed)>::type;
    return finite_only ? channels<T, true>(typed, outer, count, inner, first, last, lows, highs)
                       : channels<T, false>(typed, outer, count, inner, first, last, lows, highs);
  });
}

}  // namespace

extern const MinmaxTable minmax_table = {tensor_any, channels_any};

}  // namespace pyobserver::PYOBS_ISA
