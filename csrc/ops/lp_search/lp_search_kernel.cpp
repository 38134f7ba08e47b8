// CPU body of lp_search, compiled once per instruction set.
#include "../../core/simd.h"
#include "lp_sides.h"

namespace pyobserver::PYOBS_ISA {
namespace {

// The sum of dist(x, s Z)^p over what lies up to t, which is (b + 1/2) s; infinite where that and
// what was there before are more than `most` already.
template <class Measure>
double within(const Side& side, double s, double t, double before, double most,
              const Measure& measure) {
  const Steps steps = steps_of(s, measure);
  const Within cells = cells_within(side, s, t);
  double sums[kSums] = {side.below[cells.begin]};
  double integrals[kCellsAtOnce + 1];
  for (int32_t start = cells.begin; start < cells.end; start += kCellsAtOnce) {
    const int32_t n = cells.end - start < kCellsAtOnce ? cells.end - start : kCellsAtOnce;
    const double* edge = side.edge + start;
    for (int32_t i = 0; i <= n; ++i) {
      integrals[i] = integral(steps, edge[i], measure);
    }
    const double* density = side.density + start;
    int32_t i = 0;
    for (; i + kSums <= n; i += kSums) {
      for (int lane = 0; lane < kSums; ++lane) {
        sums[lane] += density[i + lane] * (integrals[i + lane + 1] - integrals[i + lane]);
      }
    }
    for (; i < n; ++i) {
      sums[0] += density[i] * (integrals[i + 1] - integrals[i]);
    }
    if (before + total_of(sums) > most) {
      return kInfinity;
    }
  }
  return add_rest(total_of(sums), side, cells.end, s, t, steps, measure);
}

template <class Measure>
void finish(Side* side, const Measure& measure) {
  const int32_t size = side->size;
  side->below[0] = 0.0;
  for (int32_t i = 0; i < size; ++i) {
    side->below[i + 1] = side->below[i] + power_of_cell(*side, i, measure);
  }
  side->count[size] = side->sum[size] = side->square[size] = 0.0;
  for (int32_t i = size - 1; i >= 0; --i) {
    const Moments cell = moments_of_cell(*side, i);
    side->count[i] = side->count[i + 1] + cell.count;
    side->sum[i] = side->sum[i + 1] + cell.sum;
    side->square[i] = side->square[i + 1] + cell.square;
  }
}

template <class Measure>
Side side_of(const LpHistogram& h, const Occupied& occupied, int step, double* room, int64_t stride,
             const Measure& measure) {
  Side side = empty_side(room, stride);
  Cells cells = {0, -1.0};
  for_each_cell(
      h, occupied, step, 0, occupied.last - occupied.first + 1,
      [&](double from, double to, double count) { add_cell(side, &cells, from, to, count); });
  side.size = cells.size;
  add_points(&side, h, occupied, step);
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
  const Occupied occupied = occupied_of(h, first, last);
  const int64_t stride = lp_room(h.bins) / kLpArrays;
  const Side negative = side_of(h, occupied, -1, room, stride, measure);
  const int64_t used = negative.size + 2;
  return {negative, side_of(h, occupied, 1, room + used, stride, measure)};
}

template <class Measure>
LpErrors errors_of(const Sides& sides, double s, int64_t below, int64_t above,
                   const Measure& measure) {
  const double a = static_cast<double>(below), b = static_cast<double>(above);
  LpErrors errors = {};
  errors.clipping = beyond(sides.negative, (a + 0.5) * s, a * s, measure) +
                    beyond(sides.positive, (b + 0.5) * s, b * s, measure);
  errors.rounding = within(sides.negative, s, (a + 0.5) * s, 0.0, kInfinity, measure) +
                    within(sides.positive, s, (b + 0.5) * s, 0.0, kInfinity, measure);
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
  return first_rise(n, guess, [&](int64_t b) { return has_enough(sides, b, n, s, measure); });
}

// All the rows of scales as one, descending.
class Scales {
 public:
  explicit Scales(const LpScales& scales) : scales_(scales) {
    for (int row = 0; row < LpScales::kRows; ++row) {
      level_[row] = scales.first_level[row];
    }
  }

  // False after the last.
  bool next(float* scale) {
    while (!done_) {
      double value = grid_;
      int from = LpScales::kRows;
      for (int row = 0; row < LpScales::kRows; ++row) {
        if (level_[row] <= scales_.last_level[row] &&
            scales_.extremes[row] / level_[row] >= value) {
          value = scales_.extremes[row] / static_cast<double>(level_[row]);
          from = row;
        }
      }
      if (from < LpScales::kRows) {
        level_[from] += scales_.stride;
      } else {
        grid_ = grid_scale(scales_, ++index_);
      }
      value = tried_scale(scales_, value);
      done_ = value == scales_.least;
      if (value < last_) {
        last_ = value;
        *scale = static_cast<float>(value);
        return true;
      }
    }
    return false;
  }

 private:
  LpScales scales_;
  int64_t index_ = 0;
  double grid_ = grid_scale(scales_, 0);
  int64_t level_[LpScales::kRows];
  double last_ = kInfinity;
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
      const LpScales scales = lp_scales(goal_, negative_, positive_);
      try_every(kCoarse, scales);  // so that most are given up soon
      try_every(1, scales);
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

  void try_every(int stride, const LpScales& of) {
    Scales scales(of);
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
      above_ = best_above(sides_, s, n, above_, of_split(measure_));
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
    error += within(sides_.negative, s, (a + 0.5) * s, error, least_, measure_);
    if (error <= least_) {
      error += within(sides_.positive, s, (b + 0.5) * s, error, least_, measure_);
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
  return goal.p == 2.0 ? Search(histogram, goal, room, Square{}).run()
                       : Search(histogram, goal, room, Power{goal.p}).run();
}

LpErrors errors(const LpHistogram& histogram, double scale, int64_t below, int64_t above, double p,
                double* room) {
  const auto with = [&](const auto& measure) {
    return errors_of(sides_of(histogram, room, measure), scale, below, above, measure);
  };
  return p == 2.0 ? with(Square{}) : with(Power{p});
}

}  // namespace

extern const LpSearchTable lp_search_table = {search, errors};

}  // namespace pyobserver::PYOBS_ISA
