// The scales that lp_search tries: see lp_search.h.
#pragma once

#include "lp_search.h"

namespace pyobserver {

constexpr int kScaleBits = 7;
constexpr int kLeastUnits = 1 << kScaleBits;
constexpr int64_t kMostExtremes = 256;

PYOBS_HD double least_of(double a, double b) { return a < b ? a : b; }
PYOBS_HD double greatest_of(double a, double b) { return a > b ? a : b; }

PYOBS_HD bool is_power_of_two(Constraint constraint) {
  return constraint == Constraint::power_of_two || constraint == Constraint::e8m0;
}

// The nearest one that the constraint allows, of powers of two where it is one of those.
PYOBS_HD double allowed_scale(Constraint constraint, double value) {
  if (constraint == Constraint::fp16) {
    Half half;
    from_float(static_cast<float>(least_of(value, 65504.0)), &half);
    return static_cast<double>(to_float(half));
  }
  const double most = is_power_of_two(constraint) ? 0x1p127 : 0x1.fffffep127;
  return static_cast<double>(static_cast<float>(least_of(value, most)));
}

PYOBS_HD double allowed_above(Constraint constraint, float least) {
  const double value = static_cast<double>(least);
  if (!(value > 0.0)) {
    return 0.0;
  }
  const double near = allowed_scale(constraint, value);
  if (is_power_of_two(constraint)) {
    int exponent = 0;
    const double mantissa = __builtin_frexp(near, &exponent);
    return __builtin_ldexp(1.0, mantissa > 0.5 ? exponent : exponent - 1);
  }
  // three quarters of a step to one and a half further: the next one
  return near >= value ? near
                       : allowed_scale(constraint, near + greatest_of(near * 0x3p-12, 0x3p-26));
}

// The least scale that clips nothing; 0 where no level is beside zero's.
PYOBS_HD double unclipped_scale(const LpGoal& goal, double negative, double positive) {
  const double n = static_cast<double>(goal.above), below = static_cast<double>(goal.below);
  if (goal.below < 0) {
    return (negative + positive) / n;
  }
  return greatest_of(below > 0.0 ? negative / below : 0.0, n > 0.0 ? positive / n : 0.0);
}

// The rows of scales, each descending: of the grid, without an end; of either extreme over its
// levels; and the scale of min/max alone. All are taken to what is allowed, and none is below the
// least, which is the last.
//
// The greatest is twice the one that clips nothing. Of a greater one, half has all the levels that
// it uses, and more.
struct LpScales {
  static constexpr int kRows = 3;  // beside the grid
  Constraint constraint;
  double least;
  double unit;  // of the first octave of the grid
  int units;    // of its greatest scale
  double extremes[kRows];
  int64_t first_level[kRows], last_level[kRows], stride;
};

PYOBS_HD_LARGE LpScales lp_scales(const LpGoal& goal, double negative, double positive) {
  LpScales scales;
  const bool split = goal.below < 0;
  const bool powers = is_power_of_two(goal.constraint);
  const int64_t n = goal.above;
  const double unclipped = unclipped_scale(goal, negative, positive);
  const double top = 2.0 * unclipped;
  const double finest = goal.constraint == Constraint::fp16   ? 0x1p-24
                        : goal.constraint == Constraint::e8m0 ? 0x1p-127
                                                              : 0x1p-126;
  scales.constraint = goal.constraint;
  scales.least = greatest_of(allowed_above(goal.constraint, goal.least), finest);
  int exponent = 0;
  const double mantissa = __builtin_frexp(top, &exponent) * (2 * kLeastUnits);
  scales.units = static_cast<int>(mantissa);
  scales.units += static_cast<double>(scales.units) < mantissa ? 1 : 0;
  scales.unit = __builtin_ldexp(1.0, exponent - kScaleBits - 1);
  if (powers) {
    scales.unit *= scales.units > kLeastUnits ? 2 : 1;
    scales.units = kLeastUnits;
  }
  const double steps = static_cast<double>(goal.below + n);
  scales.extremes[0] = negative;
  scales.extremes[1] = positive;
  scales.extremes[2] = split ? unclipped : greatest_of(negative, positive) / (steps / 2.0);
  scales.first_level[2] = powers ? 2 : 1;
  scales.last_level[2] = 1;
  scales.stride = split ? (n + kMostExtremes - 1) / kMostExtremes : 1;
  for (int side = 0; side < 2; ++side) {
    const int64_t fixed = side == 0 ? goal.below : n;
    const double first = __builtin_ceil(scales.extremes[side] / top);
    scales.first_level[side] = split ? (first > 1.0 ? static_cast<int64_t>(first) : 1) : fixed;
    scales.last_level[side] = split ? n : fixed;
    if (!(scales.extremes[side] > 0.0) || fixed == 0 || powers) {
      scales.first_level[side] = scales.last_level[side] + 1;
    }
  }
  return scales;
}

PYOBS_HD double half_to_the(int64_t power) {  // no less than the least normal number
  const uint64_t bits = static_cast<uint64_t>(power < 1022 ? 1023 - power : 1) << 52;
  double value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

// Scale number `index` of the grid, of kLeastUnits mantissas in each octave, or one.
PYOBS_HD double grid_scale(const LpScales& scales, int64_t index) {
  if (is_power_of_two(scales.constraint)) {
    return scales.units * scales.unit * half_to_the(index);
  }
  const int64_t first_octave = scales.units - kLeastUnits + 1;
  if (index < first_octave) {
    return static_cast<double>(scales.units - index) * scales.unit;
  }
  const auto further = static_cast<uint64_t>(index - first_octave);
  const auto units =
      static_cast<double>(2 * kLeastUnits - 1 - static_cast<int>(further % kLeastUnits));
  return units * scales.unit * half_to_the(1 + static_cast<int64_t>(further / kLeastUnits));
}

// How many scales a row beside the grid has, and scale number `index` of it.
PYOBS_HD int64_t level_count(const LpScales& scales, int row) {
  const int64_t levels = scales.last_level[row] - scales.first_level[row];
  return levels < 0 ? 0 : levels / scales.stride + 1;
}

PYOBS_HD double level_scale(const LpScales& scales, int row, int64_t index) {
  return scales.extremes[row] /
         static_cast<double>(scales.first_level[row] + index * scales.stride);
}

// A scale as it is tried.
PYOBS_HD double tried_scale(const LpScales& scales, double value) {
  return greatest_of(allowed_scale(scales.constraint, value), scales.least);
}

}  // namespace pyobserver
