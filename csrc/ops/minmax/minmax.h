// minmax: the least and greatest value of a tensor, or of each channel, folded into a state.
//
//   running:         min' = min(min, cur)
//   moving average:  min' = min + c * (cur - min); the first batch, known by min = +inf and
//                    max = -inf, in full
//   memoryless:      min' = cur
//
// Values are taken as float32. NaN and infinities are left out, or let in as torch does. The
// result does not depend on how the work is cut: minimum and maximum are exact.
#pragma once

#include "../../core/cpu_isa.h"
#include "../../core/dtype.h"

namespace pyobserver {

enum class MinmaxUpdate { running, moving_average, memoryless };  // as the op numbers them

struct Range {
  float low;
  float high;
};

PYOBS_HD Range empty_range() { return {__builtin_huge_valf(), -__builtin_huge_valf()}; }

PYOBS_HD bool is_empty(Range range) { return range.low > range.high; }

// One zero and one NaN, whichever of them came first.
PYOBS_HD float canonical(float value) { return value == value ? value + 0.0f : __builtin_nanf(""); }
PYOBS_HD Range canonical(Range range) { return {canonical(range.low), canonical(range.high)}; }

// With NaN in either, NaN, as torch.minimum and torch.maximum have it.
PYOBS_HD Range merge(Range a, Range b) {
  return {(b.low < a.low || b.low != b.low) ? b.low : a.low,
          (b.high > a.high || b.high != b.high) ? b.high : a.high};
}

// In float32 as torch computes it; in float64 where the difference leaves float32.
PYOBS_HD float average(float state, float current, float averaging_constant) {
  const float difference = current - state;
  if (is_finite(difference)) {
    return state + averaging_constant * difference;
  }
  return static_cast<float>(static_cast<double>(state) +
                            static_cast<double>(averaging_constant) *
                                (static_cast<double>(current) - static_cast<double>(state)));
}

PYOBS_HD Range fold(Range state, Range current, MinmaxUpdate update, float averaging_constant) {
  if (is_empty(current)) {
    return state;
  }
  current = canonical(current);
  const Range unfed = empty_range();
  const bool first = state.low == unfed.low && state.high == unfed.high;
  switch (update) {
    case MinmaxUpdate::running:
      return merge(state, current);
    case MinmaxUpdate::moving_average:
      if (!first) {
        return {average(state.low, current.low, averaging_constant),
                average(state.high, current.high, averaging_constant)};
      }
      return current;
    default:
      return current;
  }
}

struct MinmaxTable {
  // Merges n values into lows and highs; returns how many were NaN or infinite. The first is
  // element `offset` of a piece, of which element i belongs to the channel (i / inner) % channels.
  int64_t (*groups)(DType dtype, const void* x, int64_t n, int64_t offset, int64_t channels,
                    int64_t inner, bool finite_only, float* lows, float* highs);
};

PYOBS_KERNEL_TABLE(MinmaxTable, minmax_table)

}  // namespace pyobserver
