// range_search: the greedy L2 search of torch and caffe2 over a histogram.
//
// From both ends the kept bins are drawn in by quantiles of 1e-5, the end with the larger step in
// bins first, until the squared error of `levels` levels over them grows for the first time.
// Values spread evenly over their bin; one between begin and end of its bin goes to the centre of
// its level, those outside the kept bins to the first or last level.
//
// The worst case: every error draws an end in by a bin at least, so fewer than `bins` errors are
// taken, each a sum over the bins (blocks of eight without counts left out). The quantiles that
// move nothing take no time.
#pragma once

#include "../../core/cpu_isa.h"
#include "../../core/dtype.h"

namespace pyobserver {

struct BinSpan {
  int32_t first, last;
};

struct ErrorParams {
  float bin_width, level_width, half_level;
  int32_t start;
  float top_level;
  float per_level;   // what a full level adds at density 1
  float per_width;   // 1 / level_width
  float inside_top;  // a distance within the top level
};

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define PYOBS_HAS_FMA 1  // elsewhere it is a library call
#else
#define PYOBS_HAS_FMA 0
#endif

constexpr int64_t kFewLevels = int64_t{1} << 20;

// The level of a distance from the first kept bin: the floor of its quotient by the level's width,
// held between the first and the top level. And the third of a cube.
struct Many {
  // Exact in float64, whose quotient never rounds across an integer that the true one does not
  // reach.
  PYOBS_HD float level(float at, const ErrorParams& p) {
    const float level = static_cast<float>(
        __builtin_floor(static_cast<double>(at) / static_cast<double>(p.level_width)));
    const float from_zero = level > 0.0f ? level : 0.0f;
    return from_zero < p.top_level ? from_zero : p.top_level;
  }
  PYOBS_HD float third(float x) { return x / 3.0f; }
};

// The same bits without a division, up to kFewLevels.
struct Few {
  // The product is within 2^21 * 2^-23 of the quotient, so the integer nearest to it is the floor
  // or the next one, and in that case the remainder is negative. Its sign is right: rounded once,
  // it is 0 only if it is 0 (it is a multiple of 2^-46, as a bin is at least 1/2 wide).
  PYOBS_HD float level(float at, const ErrorParams& p) {
    constexpr float kNoFraction = 0x1p23f;  // a sum with it is an integer
    at = at > 0.0f ? at : 0.0f;
    at = at < p.inside_top ? at : p.inside_top;
    const float nearest = (at * p.per_width + kNoFraction) - kNoFraction;
#if PYOBS_HAS_FMA
    const float remainder = __builtin_fmaf(-nearest, p.level_width, at);
#else  // the product of two floats is exact in float64
    const float remainder =
        static_cast<float>(static_cast<double>(at) -
                           static_cast<double>(nearest) * static_cast<double>(p.level_width));
#endif
    return remainder < 0.0f ? nearest - 1.0f : nearest;
  }

  // Corrected by its exact remainder the quotient is that of the division, rounded to nearest:
  // tried with every mantissa, and no cube here is near underflow.
  PYOBS_HD float third(float x) {
#if PYOBS_HAS_FMA
    constexpr float kThird = 1.0f / 3.0f;
    const float quotient = x * kThird;
    return __builtin_fmaf(__builtin_fmaf(-3.0f, quotient, x), kThird, quotient);
#else
    return x / 3.0f;
#endif
  }
};

// Few, for bins before the first or after the last of the kept ones: their distances are at most 0,
// or at least the width of all levels but for a rounding, 2^-22 of it.
struct FewBefore : Few {
  PYOBS_HD float level(float, const ErrorParams&) { return 0.0f; }
};
struct FewAfter : Few {
  PYOBS_HD float level(float, const ErrorParams& p) { return p.top_level; }
};

PYOBS_HD float cube(float x) { return x * x * x; }

// In float32 as torch computes it. What is spread between begin and end with a density errs by
// density * ((end^3 - begin^3) / 3).
template <class Levels>
PYOBS_HD float bin_error(int32_t bin, float density, const ErrorParams& p) {
  const float begin = static_cast<float>(bin - p.start) * p.bin_width;
  const float end = begin + p.bin_width;
  const float first = Levels::level(begin, p);
  const float last = Levels::level(end, p);
  const float below = begin - (first + 0.5f) * p.level_width;
  const float above = end - (last * p.level_width + p.half_level);
  float error = density * Levels::third(cube(p.half_level) - cube(below));
  error += (last - first - 1.0f) * (density * p.per_level);
  return error + density * Levels::third(cube(above) - cube(-p.half_level));
}

// Room for a search, each of as many as the bins and kSearchPadding: a bin after the last block of
// eight has one to itself.
constexpr int64_t kSearchPadding = 7 * 8;
struct SearchScratch {
  float* cumulative;
  float* density;
  int32_t* occupied;
};

struct RangeSearchTable {
  // width: of a bin. total: of the counts.
  BinSpan (*greedy_l2)(const double* counts, int32_t bins, double width, double total,
                       int64_t num_levels, const SearchScratch& scratch);
};

PYOBS_KERNEL_TABLE(RangeSearchTable, range_search_table)

}  // namespace pyobserver
