// The values of a histogram as lp_search takes them, and what part of the error lies where: see
// lp_search.h.
#pragma once

#include "lp_scales.h"

namespace pyobserver {

constexpr double kInfinity = __builtin_huge_val();
constexpr int32_t kCellsAtOnce = 128;  // after so many a sum that is too great already is given up

PYOBS_HD double nearest(double x) { return (x + 0x1.8p52) - 0x1.8p52; }  // ties to even

// |x|^p, and its integral from 0.
struct Square {
  static constexpr bool kMoments = true;  // tails come from moments
};
struct Power {
  static constexpr bool kMoments = false;
  double p;
};

// By which the zero point is chosen: below 1 the error is not convex in it.
PYOBS_HD Square of_split(const Square& measure) { return measure; }
PYOBS_HD Power of_split(const Power& measure) { return {greatest_of(measure.p, 1.0)}; }

PYOBS_HD double power(const Square&, double x) { return x * x; }
PYOBS_HD double integral(const Square&, double x) { return x * x * x / 3.0; }
PYOBS_HD_CALLED double power_of(double x, double p) { return __builtin_pow(__builtin_fabs(x), p); }
PYOBS_HD double power(const Power& measure, double x) { return power_of(x, measure.p); }
PYOBS_HD double integral(const Power& measure, double x) {
  const double p = measure.p + 1.0;
  return __builtin_copysign(power_of(x, p) / p, x);
}

// The values of one sign by their magnitudes, ascending: cells of even density, and the extremes.
struct Side {
  int32_t size;
  double *edge, *density;
  double *count, *sum, *square;  // of all cells from i on
  double* below;                 // sum of x^p of all cells before i
  double point[2], points[2];    // values and how many
};

PYOBS_HD Side empty_side(double* room, int64_t stride) {
  return {0,
          room,
          room + stride,
          room + 2 * stride,
          room + 3 * stride,
          room + 4 * stride,
          room + 5 * stride,
          {0.0, 0.0},
          {0.0, 0.0}};
}

struct Sides {
  Side negative, positive;
};

// The bins with counts, and how many of the outermost are single values.
struct Occupied {
  int32_t first, last;
  double at_low, at_high;
};

PYOBS_HD double at_extreme(const LpHistogram& h, int32_t bin, int32_t inward) {
  const bool wide = h.edges[bin] < h.high && h.edges[bin + 1] > h.low;
  return wide && h.counts[inward] > 0.0 ? least_of(h.counts[bin], 1.0) : h.counts[bin];
}

PYOBS_HD Occupied occupied_of(const LpHistogram& h, int32_t first, int32_t last) {
  if (first < last) {
    return {first, last, at_extreme(h, first, first + 1), at_extreme(h, last, last - 1)};
  }
  const double at_high = h.low < h.high ? least_of(h.counts[last], 1.0) : h.counts[last];
  return {first, last, least_of(h.counts[first] - at_high, 1.0), at_high};
}

// The cells so far, and where the last one ends; below 0 before the first.
struct Cells {
  int32_t size;
  double reached;
};

PYOBS_HD void add_cell(const Side& side, Cells* cells, double from, double to, double count) {
  int32_t size = cells->size;
  if (cells->reached < 0.0) {
    side.edge[0] = from;
  } else if (cells->reached < from) {  // a gap
    side.density[size] = 0.0;
    side.edge[++size] = from;
  }
  side.density[size] = count / (to - from);
  side.edge[++size] = to;
  *cells = {size, to};
}

// The cells of one sign, taken from zero outwards; `step` is 1 or -1, and so is the sign. Of the
// occupied bins in that order, those from `begin` to before `end`.
template <class Add>
PYOBS_HD void for_each_cell(const LpHistogram& h, const Occupied& occupied, int step, int32_t begin,
                            int32_t end, const Add& add) {
  const double sign = step;
  const auto of_sign = [&](double value) { return greatest_of(sign * value, 0.0); };
  int32_t i = step > 0 ? occupied.first + begin : occupied.last - begin;
  for (int32_t left = end - begin; left > 0; --left, i += step) {
    double count = h.counts[i];
    count -= (i == occupied.first ? occupied.at_low : 0.0) +
             (i == occupied.last ? occupied.at_high : 0.0);
    const double low = greatest_of(h.edges[i], h.low), high = least_of(h.edges[i + 1], h.high);
    const double near = of_sign(step > 0 ? low : high), far = of_sign(step > 0 ? high : low);
    if (count > 0.0 && far > near) {
      add(near, far, count * ((far - near) / (high - low)));
    }
  }
}

PYOBS_HD void add_point(Side* side, double value, double count) {
  if (!(count > 0.0 && value > 0.0)) {
    return;
  }
  const int k = side->points[0] > 0.0 ? 1 : 0;
  side->point[k] = value;
  side->points[k] = count;
}

PYOBS_HD void add_points(Side* side, const LpHistogram& h, const Occupied& occupied, double sign) {
  add_point(side, sign * h.low, occupied.at_low);
  add_point(side, sign * h.high, occupied.at_high);
}

// The sum of |x|^p over a cell.
template <class Measure>
PYOBS_HD double power_of_cell(const Side& side, int32_t i, const Measure& measure) {
  return side.density[i] * (integral(measure, side.edge[i + 1]) - integral(measure, side.edge[i]));
}

struct Moments {
  double count, sum, square;
};

PYOBS_HD Moments moments_of_cell(const Side& side, int32_t i) {
  const double l = side.edge[i], r = side.edge[i + 1];
  const double values = side.density[i] * (r - l);
  return {values, values * (l + r) / 2.0, values * (l * l + l * r + r * r) / 3.0};
}

// The first cell that reaches beyond t.
PYOBS_HD_LARGE int32_t cell_at(const Side& side, double t) {
  int32_t begin = 0, length = side.size;
  while (length > 0) {
    const int32_t half = length / 2;
    const bool before = side.edge[begin + half + 1] <= t;
    begin = before ? begin + half + 1 : begin;
    length = before ? length - half - 1 : half;
  }
  return begin;
}

// The moments of what lies above t.
PYOBS_HD_LARGE Moments tail(const Side& side, double t) {
  const int32_t i = cell_at(side, t);
  Moments result = {side.count[i], side.sum[i], side.square[i]};
  if (i < side.size && side.edge[i] < t) {
    const double from = side.edge[i];
    const double taken = side.density[i] * (t - from);
    result.count -= taken;
    result.sum -= taken * (from + t) / 2.0;
    result.square -= taken * (from * from + from * t + t * t) / 3.0;
  }
  for (int k = 0; k < 2; ++k) {
    if (side.point[k] > t) {
      result.count += side.points[k];
      result.sum += side.points[k] * side.point[k];
      result.square += side.points[k] * side.point[k] * side.point[k];
    }
  }
  return result;
}

// The sum of |x - level|^p over what lies above t.
template <class Measure>
PYOBS_HD_LARGE double beyond(const Side& side, double t, double level, const Measure& measure) {
  if constexpr (Measure::kMoments) {
    const Moments above = tail(side, t);
    const double error = above.square - 2.0 * level * above.sum + level * level * above.count;
    return greatest_of(error, 0.0);
  }
  double error = 0.0;
  for (int32_t i = cell_at(side, t); i < side.size; ++i) {
    if (side.density[i] > 0.0) {
      const double from = greatest_of(side.edge[i], t);
      error += side.density[i] *
               (integral(measure, side.edge[i + 1] - level) - integral(measure, from - level));
    }
  }
  for (int k = 0; k < 2; ++k) {
    if (side.point[k] > t) {
      error += side.points[k] * power(measure, side.point[k] - level);
    }
  }
  return error;
}

// What level b + 1 takes away from the error of a side that has b, for p = 2 over 2 s.
template <class Measure>
PYOBS_HD_LARGE double gain(const Side& side, double b, double s, const Measure& measure) {
  const double t = (b + 0.5) * s;
  if constexpr (Measure::kMoments) {
    const Moments above = tail(side, t);
    return above.sum - t * above.count;
  }
  return beyond(side, t, b * s, measure) - beyond(side, t, (b + 1.0) * s, measure);
}

// Whether no level is to be moved to the positive side, which has b of n: false, then true.
template <class Measure>
PYOBS_HD bool has_enough(const Sides& sides, int64_t b, int64_t n, double s,
                         const Measure& measure) {
  return !(gain(sides.positive, static_cast<double>(b), s, measure) >
           gain(sides.negative, static_cast<double>(n - b - 1), s, measure));
}

// The integral of dist(x, s Z)^p from 0.
struct Steps {
  double scale, per_scale, of_one;
};

PYOBS_HD Steps steps_of(double s, const Square&) { return {s, 1.0 / s, s * s * s}; }
PYOBS_HD Steps steps_of(double s, const Power& measure) {
  return {s, 1.0 / s, 2.0 * integral(measure, 0.5 * s)};
}

PYOBS_HD double integral(const Steps& steps, double x, const Square&) {
  const double v = x * steps.per_scale;
  const double level = nearest(v);
  const double f = v - level;
  return steps.of_one * (level * (1.0 / 12.0) + f * f * f * (1.0 / 3.0));
}
PYOBS_HD double integral(const Steps& steps, double x, const Power& measure) {
  const double level = nearest(x * steps.per_scale);
  return level * steps.of_one + integral(measure, x - level * steps.scale);
}

// What lies up to t, which is (b + 1/2) s: the sums of x^p up to the first cell, the cells whose
// distances are to be added to that, and the rest.
struct Within {
  int32_t begin, end;
};

PYOBS_HD_LARGE Within cells_within(const Side& side, double s, double t) {
  const int32_t end = cell_at(side, t);
  const int32_t reached = cell_at(side, 0.5 * s);
  return {reached < end ? reached : end, end};
}

// The sum of dist(x, s Z)^p over the part of cell `end` up to t, and over the single values.
template <class Measure>
PYOBS_HD double add_rest(double error, const Side& side, int32_t end, double s, double t,
                         const Steps& steps, const Measure& measure) {
  if (end < side.size && side.edge[end] < t) {
    error += side.density[end] *
             (integral(steps, t, measure) - integral(steps, side.edge[end], measure));
  }
  for (int k = 0; k < 2; ++k) {
    if (side.points[k] > 0.0 && side.point[k] <= t) {
      const double x = side.point[k];
      error += side.points[k] * power(measure, x - nearest(x / s) * s);
    }
  }
  return error;
}

PYOBS_HD double extreme(const Side& side) {
  const double cells = side.size > 0 ? side.edge[side.size] : 0.0;
  return greatest_of(cells, greatest_of(side.point[0], side.point[1]));
}

// The sum of |x|^p.
template <class Measure>
PYOBS_HD double signal(const Side& side, const Measure& measure) {
  double total = side.below[side.size];
  for (int k = 0; k < 2; ++k) {
    total += side.points[k] > 0.0 ? side.points[k] * power(measure, side.point[k]) : 0.0;
  }
  return total;
}

}  // namespace pyobserver
