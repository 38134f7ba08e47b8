// lp_search: the scale and zero point that quantize a histogram with the least L_p error.
//
// Zero is a level, so the levels of a scale s are its multiples -a s .. b s, and the zero point
// only says how the a + b steps are split between the signs. A value is counted on its own side,
// the magnitudes of the negative ones like those of the positive. On a side with b levels
//
//   error(b) = sum over x <= (b + 1/2) s of dist(x, s Z)^p + sum over x > (b + 1/2) s of (x - b
//   s)^p
//
// the first rounding, the second clipping. For p = 2 one level more takes away
// 2 s sum over x > (b + 1/2) s of (x - (b + 1/2) s), which falls with b: the error is convex in the
// split, and the best zero point of a scale is found by bisection (so for every p >= 1; below 1 the
// zero point is that of p = 1). What even n levels on both sides leave outside, the sum of
// (x - n s)^p, is a bound from below that grows as the scale falls: once it reaches the best error
// found, no smaller scale is tried. So the answer is the least error of all scales tried with all
// zero points.
//
// The scales tried: those of a mantissa of kScaleBits bits; those that put the least or the
// greatest value seen on a level (at most 256 levels of each), which keeps a single outlier exact;
// and that of the range of all values, as min/max chooses it. From twice the scale that clips
// nothing, above which half of a scale is never worse.
//
// That is an answer without an order: of the scales with the least error the greatest. Which scale
// is tried first, and from which guess the split is found, decides at most between errors that
// rounding alone tells apart.
//
// Counts lie evenly in their bins, the outermost of which end at the least and the greatest value
// seen. Those are values by themselves: all of their bin if the next one inward is empty, or if
// they lie at its inner end, else one.
#pragma once

#include "../../core/cpu_isa.h"
#include "../../core/dtype.h"

namespace pyobserver {

enum class Constraint { none, power_of_two, fp16, e8m0 };  // as the op numbers them

struct LpGoal {
  int64_t below, above;  // levels of each side, or both of which below is -1: any split of `above`
  double p;
  Constraint constraint;
  float least;  // scale
};

struct LpErrors {
  double clipping, rounding, signal;  // sums over the values; signal: of |x|^p
};

struct LpChoice {
  float scale;
  int64_t below;  // levels
  LpErrors errors;
};

struct LpHistogram {
  const double* counts;
  const double* edges;
  int32_t bins;
  double low, high;  // the least and the greatest value seen
};

// Room for both sides of a histogram.
constexpr int kLpArrays = 6;
PYOBS_HD int64_t lp_room(int32_t bins) { return kLpArrays * (int64_t{bins} + 8); }

struct LpSearchTable {
  LpChoice (*search)(const LpHistogram& histogram, const LpGoal& goal, double* room);
  LpErrors (*errors)(const LpHistogram& histogram, double scale, int64_t below, int64_t above,
                     double p, double* room);
};

PYOBS_KERNEL_TABLE(LpSearchTable, lp_search_table)

}  // namespace pyobserver
