// range_search: the greedy L2 search of torch and caffe2 over a histogram.
//
// From both ends the kept bins are drawn in by quantiles of 1e-5, the end with the larger step in
// bins first, until the squared error of `levels` levels over them grows for the first time.
// Values spread evenly over their bin; one between begin and end of its bin goes to the centre of
// its level, those outside the kept bins to the first or last level.
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
};

// In float32 as torch computes it: density * (end^3 - begin^3) / 3.
PYOBS_HD float cube_norm(float begin, float end, float density) {
  return density * ((end * end * end - begin * begin * begin) / 3.0f);
}

// The floor of a quotient of floats: exact in float64, whose quotient never rounds across an
// integer that the true one does not reach.
PYOBS_HD float floor_divide(float a, float b) {
  return static_cast<float>(__builtin_floor(static_cast<double>(a) / static_cast<double>(b)));
}

PYOBS_HD float bin_error(int32_t bin, float density, const ErrorParams& p) {
  const float begin = static_cast<float>(bin - p.start) * p.bin_width;
  const float end = begin + p.bin_width;
  float first = floor_divide(begin, p.level_width);
  float last = floor_divide(end, p.level_width);
  first = first < 0.0f ? 0.0f : (first > p.top_level ? p.top_level : first);
  last = last < 0.0f ? 0.0f : (last > p.top_level ? p.top_level : last);
  float error = cube_norm(begin - (first + 0.5f) * p.level_width, p.half_level, density);
  error += (last - first - 1.0f) * cube_norm(-p.half_level, p.half_level, density);
  return error + cube_norm(-p.half_level, end - (last * p.level_width + p.half_level), density);
}

struct RangeSearchTable {
  // width: of a bin. total: of the counts. scratch: 2 * bins floats.
  BinSpan (*greedy_l2)(const double* counts, int32_t bins, double width, double total,
                       int64_t num_levels, float* scratch);
};

PYOBS_KERNEL_TABLE(RangeSearchTable, range_search_table)

}  // namespace pyobserver
