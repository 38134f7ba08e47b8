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

struct FloatRange {
  float low, high;
};

// Where there is something to search.
PYOBS_HD bool is_searchable(FloatRange range, double total) {
  return is_finite(range.low) && is_finite(range.high) && range.low < range.high && total > 0.0;
}

PYOBS_HD double bin_width_of(FloatRange range, int32_t bins) {
  return (static_cast<double>(range.high) - static_cast<double>(range.low)) / bins;
}

// The range of some bins of one.
PYOBS_HD FloatRange range_of(FloatRange range, int32_t bins, BinSpan span) {
  const float step = (range.high - range.low) / static_cast<float>(bins);
  if (is_finite(step)) {
    return {range.low + step * static_cast<float>(span.first),
            range.low + step * static_cast<float>(span.last + 1)};
  }
  // a width above the greatest float32
  const double low = static_cast<double>(range.low), width = bin_width_of(range, bins);
  return {static_cast<float>(low + width * span.first),
          static_cast<float>(low + width * (span.last + 1))};
}

struct ErrorParams {
  float bin_width, level_width, half_level;
  int32_t start;
  float top_level;
  float per_level;   // what a full level adds at density 1
  float per_width;   // 1 / level_width
  float inside_top;  // a distance within the top level
};

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__CUDA_ARCH__)
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

// bin_width: scaled by a power of two to below 1.
PYOBS_HD ErrorParams error_params(double bin_width, BinSpan span, int64_t num_levels) {
  const double level_width =
      bin_width * (span.last - span.first + 1) / static_cast<double>(num_levels);
  ErrorParams params;
  params.bin_width = static_cast<float>(bin_width);
  params.level_width = static_cast<float>(level_width);
  params.half_level = static_cast<float>(level_width / 2);
  params.start = span.first;
  params.top_level = static_cast<float>(num_levels - 1);
  params.per_level = (cube(params.half_level) - cube(-params.half_level)) / 3.0f;
  params.per_width = 1.0f / params.level_width;
  params.inside_top = (params.top_level + 0.5f) * params.level_width;
  return params;
}

constexpr double kQuantileStep = 1e-5;

// Where beta gets to by steps of its own until the kept bins may change: as far as beta * total
// is not below `reached`, within one power of two.
//
// There, from 1 down to 2^-10, all values are multiples of one unit, and none is at a tie: the
// step's last bit is at 2^-69, which is half a unit only below 2^-15. So each step takes off the
// same multiple of the unit, and a multiple of that is exact while the difference is above the
// border.
PYOBS_HD double skip_idle_steps(double beta, double total, float reached) {
  if (beta <= 0x1p-10) {
    return beta;
  }
  double border = 0.5;
  while (border >= beta) {
    border /= 2;
  }
  const double step = beta - (beta - kQuantileStep);
  double skipped = 0.0;
  for (double more = 0x1p16; more >= 1.0; more /= 2) {
    const double next = beta - (skipped + more) * step;
    if (next > border && !(reached > static_cast<float>(next * total))) {
      skipped += more;
    }
  }
  return beta - skipped * step;
}

// A search as it goes.
struct GreedySearch {
  const float* cumulative;
  double total, alpha, beta, best;
  BinSpan span;
  int32_t left, right;
};

PYOBS_HD GreedySearch start_search(const float* cumulative, int32_t bins, double total) {
  return {cumulative, total, 0.0, 1.0, __builtin_huge_val(), {0, bins - 1}, 0, bins - 1};
}

// The bins to try next; false where all were.
PYOBS_HD bool next_span(GreedySearch* search, BinSpan* next) {
  const float* cumulative = search->cumulative;
  const BinSpan span = search->span;
  while (search->alpha < search->beta) {
    const double next_alpha = search->alpha + kQuantileStep;
    const double next_beta = search->beta - kQuantileStep;
    // comparisons with the quantiles are float32's, as in torch
    const float lower = static_cast<float>(next_alpha * search->total);
    const float upper = static_cast<float>(next_beta * search->total);
    // both move inward only, so they go on from where they were
    int32_t left = search->left > span.last ? span.last : search->left;
    int32_t right = search->right < span.first ? span.first : search->right;
    while (left < span.last && cumulative[left] < lower) {
      ++left;
    }
    while (right > span.first && cumulative[right] > upper) {
      --right;
    }
    search->left = left;
    search->right = right;
    *next = span;
    if (left - span.first > span.last - right) {
      next->first = left;
      search->alpha = next_alpha;
    } else {
      next->last = right;
      search->beta = next_beta;
    }
    if (next->first != span.first || next->last != span.last) {
      return true;
    }
    if (span.first == span.last) {
      return false;
    }
    // alpha stays until beta has moved the last bin; when it passes alpha first, all ends anyway
    search->beta = skip_idle_steps(search->beta, search->total, cumulative[span.last]);
  }
  return false;
}

// Keeps the bins tried; false where they err more than those before, and the search ends.
PYOBS_HD bool keep_span(GreedySearch* search, BinSpan tried, double error) {
  if (error > search->best) {
    return false;
  }
  search->best = error;
  search->span = tried;
  return true;
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
