// CPU body of lp_search, compiled once per instruction set.
#include "lp_search.h"

#include "../../core/simd.h"

namespace pyobserver::PYOBS_ISA {
namespace {

constexpr int kChunk = 128;
constexpr double kInfinity = __builtin_huge_val();

PYOBS_HD double least_of(double a, double b) { return a < b ? a : b; }
PYOBS_HD double greatest_of(double a, double b) { return a > b ? a : b; }
PYOBS_HD double nearest(double x) { return (x + 0x1.8p52) - 0x1.8p52; }  // ties to even

// The values of one sign by their magnitudes, ascending: cells of even density, and the extremes.
struct Side {
  int32_t size;
  double *edge, *density;
  double *count, *sum, *square;  // of all cells from i on
  double* below;                 // sum of x^p of all cells before i
  double point[2], points[2];    // values and how many
};

struct Square {
  double power(double x) const { return x * x; }
  double integral(double x) const { return x * x * x / 3.0; }
  static constexpr bool kMoments = true;  // tails come from moments
};

struct Power {
  explicit Power(double exponent) : p(exponent) {}
  double power(double x) const { return __builtin_pow(__builtin_fabs(x), p); }
  double integral(double x) const {  // of |x|^p from 0
    return __builtin_copysign(__builtin_pow(__builtin_fabs(x), p + 1.0) / (p + 1.0), x);
  }
  static constexpr bool kMoments = false;
  double p;
};

// The first cell that reaches beyond t.
int32_t cell_at(const Side& side, double t) {
  int32_t begin = 0, length = side.size;
  while (length > 0) {
    const int32_t half = length / 2;
    const bool before = side.edge[begin + half + 1] <= t;
    begin = before ? begin + half + 1 : begin;
    length = before ? length - half - 1 : half;
  }
  return begin;
}

struct Tail {
  double count, sum, square;
};

// The moments of what lies above t.
Tail tail(const Side& side, double t) {
  const int32_t i = cell_at(side, t);
  Tail result = {side.count[i], side.sum[i], side.square[i]};
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
double beyond(const Side& side, double t, double level, const Measure& measure) {
  if constexpr (Measure::kMoments) {
    const Tail above = tail(side, t);
    const double error = above.square - 2.0 * level * above.sum + level * level * above.count;
    return greatest_of(error, 0.0);
  }
  double error = 0.0;
  for (int32_t i = cell_at(side, t); i < side.size; ++i) {
    if (side.density[i] > 0.0) {
      const double from = greatest_of(side.edge[i], t);
      error += side.density[i] *
               (measure.integral(side.edge[i + 1] - level) - measure.integral(from - level));
    }
  }
  for (int k = 0; k < 2; ++k) {
    if (side.point[k] > t) {
      error += side.points[k] * measure.power(side.point[k] - level);
    }
  }
  return error;
}

// What level b + 1 takes away from the error of a side that has b, for p = 2 over 2 s.
template <class Measure>
double gain(const Side& side, double b, double s, const Measure& measure) {
  const double t = (b + 0.5) * s;
  if constexpr (Measure::kMoments) {
    const Tail above = tail(side, t);
    return above.sum - t * above.count;
  }
  return beyond(side, t, b * s, measure) - beyond(side, t, (b + 1.0) * s, measure);
}

// The integral of dist(x, s Z)^p from 0.
struct Steps {
  double scale, per_scale, cube;
  void fill(const double* x, int32_t n, double* out, const Square&) const {
    for (int32_t i = 0; i < n; ++i) {
      const double v = x[i] * per_scale;
      const double level = nearest(v);
      const double f = v - level;
      out[i] = cube * (level * (1.0 / 12.0) + f * f * f * (1.0 / 3.0));
    }
  }
  void fill(const double* x, int32_t n, double* out, const Power& measure) const {
    const double per_step = 2.0 * measure.integral(0.5 * scale);
    for (int32_t i = 0; i < n; ++i) {
      const double level = nearest(x[i] * per_scale);
      out[i] = level * per_step + measure.integral(x[i] - level * scale);
    }
  }
};

// The sum of dist(x, s Z)^p over what lies up to t, which is (b + 1/2) s; some part of it where
// that is more than `enough` already.
template <class Measure>
double within(const Side& side, double s, double t, double enough, const Measure& measure) {
  const Steps steps = {s, 1.0 / s, s * s * s};
  const int32_t end = cell_at(side, t);
  const int32_t reached = cell_at(side, 0.5 * s);
  const int32_t begin = reached < end ? reached : end;
  double sums[kSums] = {side.below[begin]};
  double integral[kChunk + 1];
  for (int32_t start = begin; start < end; start += kChunk) {
    const int32_t n = end - start < kChunk ? end - start : kChunk;
    steps.fill(side.edge + start, n + 1, integral, measure);
    const double* density = side.density + start;
    int32_t i = 0;
    for (; i + kSums <= n; i += kSums) {
      for (int lane = 0; lane < kSums; ++lane) {
        sums[lane] += density[i + lane] * (integral[i + lane + 1] - integral[i + lane]);
      }
    }
    for (; i < n; ++i) {
      sums[0] += density[i] * (integral[i + 1] - integral[i]);
    }
    if (total_of(sums) > enough) {
      return total_of(sums);
    }
  }
  double error = total_of(sums);
  if (end < side.size && side.edge[end] < t) {
    const double ends[2] = {side.edge[end], t};
    steps.fill(ends, 2, integral, measure);
    error += side.density[end] * (integral[1] - integral[0]);
  }
  for (int k = 0; k < 2; ++k) {
    if (side.points[k] > 0.0 && side.point[k] <= t) {
      const double x = side.point[k];
      error += side.points[k] * measure.power(x - nearest(x / s) * s);
    }
  }
  return error;
}

template <class Measure>
void finish(Side* side, const Measure& measure) {
  const int32_t size = side->size;
  side->below[0] = 0.0;
  for (int32_t i = 0; i < size; ++i) {
    const double mass = measure.integral(side->edge[i + 1]) - measure.integral(side->edge[i]);
    side->below[i + 1] = side->below[i] + side->density[i] * mass;
  }
  side->count[size] = side->sum[size] = side->square[size] = 0.0;
  for (int32_t i = size - 1; i >= 0; --i) {
    const double l = side->edge[i], r = side->edge[i + 1];
    const double values = side->density[i] * (r - l);
    side->count[i] = side->count[i + 1] + values;
    side->sum[i] = side->sum[i + 1] + values * (l + r) / 2.0;
    side->square[i] = side->square[i + 1] + values * (l * l + l * r + r * r) / 3.0;
  }
}

struct Sides {
  Side negative, positive;
};

void add_point(Side* side, double value, double count) {
  const int k = side->points[0] > 0.0 ? 1 : 0;
  side->point[k] = value;
  side->points[k] = count;
}

void add_cell(Side* side, double from, double to, double count) {
  if (side->size == 0) {
    side->edge[0] = from;
  } else if (side->edge[side->size] < from) {  // a gap
    side->density[side->size] = 0.0;
    side->edge[++side->size] = from;
  }
  side->density[side->size] = count / (to - from);
  side->edge[++side->size] = to;
}

// The cells of one sign, taken from zero outwards; `step` is 1 or -1, and so is the sign.
template <class Measure>
Side side_of(const LpHistogram& h, int step, int32_t first, int32_t last, double at_low,
             double at_high, double* room, int64_t stride, const Measure& measure) {
  Side side = {0,
               room,
               room + stride,
               room + 2 * stride,
               room + 3 * stride,
               room + 4 * stride,
               room + 5 * stride,
               {0.0, 0.0},
               {0.0, 0.0}};
  const double sign = step;
  const auto of_sign = [&](double value) { return greatest_of(sign * value, 0.0); };
  for (int32_t i = step > 0 ? first : last; i >= first && i <= last; i += step) {
    double count = h.counts[i];
    count -= (i == first ? at_low : 0.0) + (i == last ? at_high : 0.0);
    const double begin = greatest_of(h.edges[i], h.low), end = least_of(h.edges[i + 1], h.high);
    const double near = of_sign(step > 0 ? begin : end), far = of_sign(step > 0 ? end : begin);
    if (count > 0.0 && far > near) {
      add_cell(&side, near, far, count * ((far - near) / (end - begin)));
    }
  }
  if (at_low > 0.0 && sign * h.low > 0.0) {
    add_point(&side, sign * h.low, at_low);
  }
  if (at_high > 0.0 && sign * h.high > 0.0) {
    add_point(&side, sign * h.high, at_high);
  }
  finish(&side, measure);
  return side;
}

template <class Measure>
Sides sides_of(const LpHistogram& h, double* room, const Measure& measure) {
  int32_t first = 0, last = h.bins - 1;
  while (first < last && !(h.counts[first] > 0.0)) {
    ++first;
  }
  while (last > first && !(h.counts[last] > 0.0)) {
    --last;
  }
  const auto at_extreme = [&](int32_t bin, int32_t inward) {
    const bool wide = h.edges[bin] < h.high && h.edges[bin + 1] > h.low;
    return wide && h.counts[inward] > 0.0 ? least_of(h.counts[bin], 1.0) : h.counts[bin];
  };
  double at_low, at_high;
  if (first == last) {
    at_high = h.low < h.high ? least_of(h.counts[last], 1.0) : h.counts[last];
    at_low = least_of(h.counts[first] - at_high, 1.0);
  } else {
    at_low = at_extreme(first, first + 1);
    at_high = at_extreme(last, last - 1);
  }
  const int64_t stride = lp_room(h.bins) / kLpArrays;
  const Side negative = side_of(h, -1, first, last, at_low, at_high, room, stride, measure);
  const int64_t used = negative.size + 2;
  const Side positive = side_of(h, 1, first, last, at_low, at_high, room + used, stride, measure);
  return {negative, positive};
}

double extreme(const Side& side) {
  const double cells = side.size > 0 ? side.edge[side.size] : 0.0;
  return greatest_of(cells, greatest_of(side.point[0], side.point[1]));
}

// The sum of |x|^p.
template <class Measure>
double signal(const Side& side, const Measure& measure) {
  double total = side.below[side.size];
  for (int k = 0; k < 2; ++k) {
    total += side.points[k] > 0.0 ? side.points[k] * measure.power(side.point[k]) : 0.0;
  }
  return total;
}

template <class Measure>
LpErrors errors_of(const Sides& sides, double s, int64_t below, int64_t above,
                   const Measure& measure) {
  const double a = static_cast<double>(below), b = static_cast<double>(above);
  LpErrors errors = {};
  errors.clipping = beyond(sides.negative, (a + 0.5) * s, a * s, measure) +
                    beyond(sides.positive, (b + 0.5) * s, b * s, measure);
  errors.rounding = within(sides.negative, s, (a + 0.5) * s, kInfinity, measure) +
                    within(sides.positive, s, (b + 0.5) * s, kInfinity, measure);
  errors.signal = signal(sides.negative, measure) + signal(sides.positive, measure);
  return errors;
}

// The least b in [0, n] for which rises(b) is true, n if none; true stays true. Found outwards from
// a guess, as the next scale's is near the last one's.
template <class Rises>
int64_t first_rise(int64_t n, int64_t guess, const Rises& rises) {
  int64_t low = 0, high = n;  // the answer is in [low, high]
  int64_t step = 1;
  int64_t at = guess < n ? guess : n - 1;
  while (low < high) {
    if (rises(at)) {
      high = at;
      at = at - step < low ? low + (high - low) / 2 : at - step;
    } else {
      low = at + 1;
      at = at + step >= high ? low + (high - low) / 2 : at + step;
    }
    step *= 2;
  }
  return low;
}

template <class Measure>
int64_t best_above(const Sides& sides, double s, int64_t n, int64_t guess, const Measure& measure) {
  return first_rise(n, guess, [&](int64_t b) {
    return !(gain(sides.positive, static_cast<double>(b), s, measure) >
             gain(sides.negative, static_cast<double>(n - b - 1), s, measure));
  });
}

// The least scale that clips nothing; 0 where no level is beside zero's.
double unclipped_scale(const LpGoal& goal, double negative, double positive) {
  const double n = static_cast<double>(goal.above), below = static_cast<double>(goal.below);
  if (goal.below < 0) {
    return (negative + positive) / n;
  }
  return greatest_of(below > 0.0 ? negative / below : 0.0, n > 0.0 ? positive / n : 0.0);
}

// The scales to try, descending: from twice the one that clips nothing. Of a greater one, half has
// all the levels that it uses, and more.
class Scales {
 public:
  Scales(const LpGoal& goal, double negative, double positive) : goal_(goal) {
    const bool split = goal.below < 0;
    const int64_t n = goal.above;
    const double unclipped = unclipped_scale(goal, negative, positive);
    const double top = 2.0 * unclipped;
    const double finest = goal.constraint == Constraint::fp16   ? 0x1p-24
                          : goal.constraint == Constraint::e8m0 ? 0x1p-127
                                                                : 0x1p-126;
    least_ = greatest_of(allowed_above(goal.least), finest);
    int exponent = 0;
    double mantissa = __builtin_frexp(top, &exponent) * (2 << kScaleBits);
    units_ = static_cast<int>(mantissa);
    units_ += static_cast<double>(units_) < mantissa ? 1 : 0;
    unit_ = __builtin_ldexp(1.0, exponent - kScaleBits - 1);
    if (is_power_of_two()) {
      unit_ *= units_ > (1 << kScaleBits) ? 2 : 1;
      units_ = 1 << kScaleBits;
    }
    extremes_[0] = negative;
    extremes_[1] = positive;
    const double steps = static_cast<double>(goal.below + n);
    extremes_[2] = split ? unclipped : greatest_of(negative, positive) / (steps / 2.0);
    level_[2] = is_power_of_two() ? 2 : 1;
    last_level_[2] = 1;
    stride_ = split ? (n + kMostExtremes - 1) / kMostExtremes : 1;
    for (int side = 0; side < 2; ++side) {
      const int64_t fixed = side == 0 ? goal.below : n;
      const double first = __builtin_ceil(extremes_[side] / top);
      level_[side] = split ? (first > 1.0 ? static_cast<int64_t>(first) : 1) : fixed;
      last_level_[side] = split ? n : fixed;
      if (!(extremes_[side] > 0.0) || fixed == 0 || is_power_of_two()) {
        level_[side] = last_level_[side] + 1;
      }
    }
  }

  // False after the last.
  bool next(float* scale) {
    while (!done_) {
      double value = units_ * unit_;
      int from = kStreams;
      for (int side = 0; side < kStreams; ++side) {
        if (level_[side] <= last_level_[side] && extremes_[side] / level_[side] >= value) {
          value = extremes_[side] / static_cast<double>(level_[side]);
          from = side;
        }
      }
      if (from < kStreams) {
        level_[from] += stride_;
      } else if (is_power_of_two() || --units_ < (1 << kScaleBits)) {
        units_ = is_power_of_two() ? 1 << kScaleBits : (2 << kScaleBits) - 1;
        unit_ /= 2.0;
      }
      value = allowed(value);
      if (value <= least_) {
        value = least_;
        done_ = true;
      }
      if (value < last_) {
        last_ = value;
        *scale = static_cast<float>(value);
        return true;
      }
    }
    return false;
  }

 private:
  bool is_power_of_two() const {
    return goal_.constraint == Constraint::power_of_two || goal_.constraint == Constraint::e8m0;
  }

  double allowed(double value) const {
    if (goal_.constraint == Constraint::fp16) {
      Half half;
      from_float(static_cast<float>(least_of(value, 65504.0)), &half);
      return static_cast<double>(to_float(half));
    }
    const double most = is_power_of_two() ? 0x1p127 : 0x1.fffffep127;
    return static_cast<double>(static_cast<float>(least_of(value, most)));
  }

  double allowed_above(float least) const {
    const double value = static_cast<double>(least);
    if (!(value > 0.0)) {
      return 0.0;
    }
    if (is_power_of_two()) {
      int exponent = 0;
      const double mantissa = __builtin_frexp(allowed(value), &exponent);
      return __builtin_ldexp(1.0, mantissa > 0.5 ? exponent : exponent - 1);
    }
    const double near = allowed(value);
    // three quarters of a step to one and a half further: the next one
    return near >= value ? near : allowed(near + greatest_of(near * 0x3p-12, 0x3p-26));
  }

  // beside the grid: the extremes over their levels, and the scale of min/max
  static constexpr int kStreams = 3;
  LpGoal goal_;
  double least_, unit_, last_ = kInfinity;
  int units_;
  double extremes_[kStreams];
  int64_t level_[kStreams], last_level_[kStreams], stride_;
  bool done_ = false;
};

template <class Measure>
class Search {
 public:
  Search(const LpHistogram& histogram, const LpGoal& goal, double* room, const Measure& measure)
      : goal_(goal),
        measure_(measure),
        sides_(sides_of(histogram, room, measure)),
        negative_(extreme(sides_.negative)),
        positive_(extreme(sides_.positive)),
        split_(goal.below < 0),
        above_(goal.above) {
    best_ = {1.0f, split_ ? 0 : goal.below, {}};
  }

  LpChoice run() {
    if (unclipped_scale(goal_, negative_, positive_) > 0.0) {  // else no scale changes anything
      try_every(kCoarse);                                      // so that most are given up soon
      try_every(1);
    }
    const int64_t above = split_ ? goal_.above - best_.below : goal_.above;
    best_.errors = errors_of(sides_, best_.scale, best_.below, above, measure_);
    return best_;
  }

 private:
  static constexpr int kCoarse = 16;

  LpGoal goal_;
  Measure measure_;
  Sides sides_;
  double negative_, positive_;
  bool split_;
  int64_t above_;  // levels of the last scale tried
  double least_ = kInfinity;
  LpChoice best_;

  void try_every(int stride) {
    Scales scales(goal_, negative_, positive_);
    int index = 0;
    for (float scale; scales.next(&scale); ++index) {
      if (index % stride == 0 && !try_scale(scale)) {
        return;
      }
    }
  }

  // False where no smaller scale can be better.
  bool try_scale(float scale) {
    const double s = scale;
    const int64_t n = goal_.above;
    if (split_) {
      above_ = goal_.p >= 1.0 ? best_above(sides_, s, n, above_, measure_)
                              : best_above(sides_, s, n, above_, Power(1.0));
    }
    const int64_t below = split_ ? n - above_ : goal_.below;
    const double a = static_cast<double>(below), b = static_cast<double>(above_);
    double error = beyond(sides_.negative, (a + 0.5) * s, a * s, measure_) +
                   beyond(sides_.positive, (b + 0.5) * s, b * s, measure_);
    if (error > least_) {
      const double low = static_cast<double>(split_ ? n : below) * s;
      const double high = static_cast<double>(n) * s;
      return beyond(sides_.negative, low, low, measure_) +
                 beyond(sides_.positive, high, high, measure_) <=
             least_;
    }
    error += within(sides_.negative, s, (a + 0.5) * s, least_ - error, measure_);
    if (error <= least_) {
      error += within(sides_.positive, s, (b + 0.5) * s, least_ - error, measure_);
    }
    if (error < least_ || (error == least_ && scale > best_.scale)) {
      least_ = error;
      best_.scale = scale;
      best_.below = below;
    }
    return true;
  }
};

LpChoice search(const LpHistogram& histogram, const LpGoal& goal, double* room) {
  return goal.p == 2.0 ? Search(histogram, goal, room, Square()).run()
                       : Search(histogram, goal, room, Power(goal.p)).run();
}

LpErrors errors(const LpHistogram& histogram, double scale, int64_t below, int64_t above, double p,
                double* room) {
  const auto with = [&](const auto& measure) {
    return errors_of(sides_of(histogram, room, measure), scale, below, above, measure);
  };
  return p == 2.0 ? with(Square()) : with(Power(p));
}

}  // namespace

extern const LpSearchTable lp_search_table = {search, errors};

}  // namespace pyobserver::PYOBS_ISA
