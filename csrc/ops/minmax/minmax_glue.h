// What the glue of every op that begins with minima and maxima shares: minmax, histogram,
// observe_fake_quantize.
#pragma once

#include <algorithm>

#include "../../core/layout.h"
#include "../../core/parallel.h"
#include "minmax.h"

namespace pyobserver {

// The ranges of all groups over torch's threads; returns how many values were NaN or infinite.
inline int64_t group_ranges(DType dtype, const void* data, const Layout& layout, bool finite_only,
                            float* lows, float* highs) {
  const int64_t groups = layout.groups;
  std::fill_n(lows, groups, empty_range().low);
  std::fill_n(highs, groups, empty_range().high);
  const auto reduce = [&](int64_t begin, int64_t end, float* part_lows, float* part_highs) {
    int64_t nonfinite = 0;
    layout.for_each_span(data, element_size(dtype), begin, end,
                         [&](const void* x, int64_t, int64_t count, int64_t offset, int64_t base) {
                           nonfinite += minmax_table().groups(
                               dtype, x, count, offset, layout.channels, layout.inner, finite_only,
                               part_lows + base, part_highs + base);
                         });
    return nonfinite;
  };
  int64_t parts = part_count(layout.numel);
  if (parts == 1) {
    return layout.repeat * reduce(0, layout.numel, lows, highs);
  }
  Scratch<int64_t> nonfinite(parts);
  const bool disjoint = layout.border > 0 && layout.numel / layout.border >= 4 * parts;
  if (disjoint) {
    for_each_part(layout.numel, parts, layout.border,
                  [&](int64_t part, int64_t begin, int64_t end) {
                    nonfinite[part] = reduce(begin, end, lows, highs);
                  });
  } else {
    // ranges of its own for each part; where they would be more than the tensor, one part
    if (parts * groups > layout.numel) {
      return layout.repeat * reduce(0, layout.numel, lows, highs);
    }
    const int64_t period = layout.channels * layout.inner;
    const int64_t multiple = layout.numel / period >= 4 * parts ? period : 64;
    const int64_t stride = row_stride(groups, sizeof(float));
    Scratch<float> part_lows(parts * stride), part_highs(parts * stride);
    std::fill_n(part_lows.data(), parts * stride, empty_range().low);
    std::fill_n(part_highs.data(), parts * stride, empty_range().high);
    for_each_part(layout.numel, parts, multiple, [&](int64_t part, int64_t begin, int64_t end) {
      nonfinite[part] =
          reduce(begin, end, part_lows.data() + part * stride, part_highs.data() + part * stride);
    });
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t i = 0; i < groups; ++i) {
        const Range range = merge({lows[i], highs[i]},
                                  {part_lows[part * stride + i], part_highs[part * stride + i]});
        lows[i] = range.low;
        highs[i] = range.high;
      }
    }
  }
  int64_t total = 0;
  for (int64_t part = 0; part < parts; ++part) {
    total += nonfinite[part];
  }
  return layout.repeat * total;
}

struct MinmaxArgs {
  const Tensor &min_val, &max_val, &nonfinite_count;
  MinmaxUpdate update;
  float averaging_constant;
  Nonfinite nonfinite;
};

inline MinmaxArgs parse_minmax(const char* op, const Tensor& x, const Tensor& min_val,
                               const Tensor& max_val, const Tensor& nonfinite_count,
                               const Grouping& grouping, int64_t update, double averaging_constant,
                               int64_t nonfinite) {
  check_state(op, "min_val", min_val, x, ScalarType::Float);
  check_state(op, "max_val", max_val, x, ScalarType::Float);
  check_state(op, "nonfinite_count", nonfinite_count, x, ScalarType::Long);
  check_numel(op, "nonfinite_count", nonfinite_count, 1);
  check(update >= 0 && update <= 2, op,
        ": update: expected 0 (running), 1 (moving average) or 2 (memoryless), got ", update);
  check(averaging_constant > 0.0 && averaging_constant <= 1.0, op,
        ": averaging_constant: expected a value in (0, 1], got ", averaging_constant);
  if (x.numel() > 0) {
    check_groups(op, "min_val", min_val, x, grouping);
    check_groups(op, "max_val", max_val, x, grouping);
  }
  return {min_val,
          max_val,
          nonfinite_count,
          static_cast<MinmaxUpdate>(update),
          static_cast<float>(averaging_constant),
          parse_nonfinite(op, nonfinite)};
}

// What a tensor, which is not empty, makes of the state. Nothing is written before commit().
class MinmaxChange {
 public:
  MinmaxChange(const char* op, DType dtype, const Tensor& x, const Grouping& grouping,
               const MinmaxArgs& args)
      : args_(args),
        layout_(Layout::of_reduction(x, grouping)),
        lows_(layout_.groups),
        highs_(layout_.groups) {
    nonfinite_ = group_ranges(dtype, x.const_data_ptr(), layout_,
                              args.nonfinite == Nonfinite::ignore, lows_.data(), highs_.data());
    check_finite(op, args.nonfinite, nonfinite_, x.numel());
    const float* old_lows = const_data<float>(args.min_val);
    const float* old_highs = const_data<float>(args.max_val);
    for (int64_t i = 0; i < layout_.groups; ++i) {
      const Range range = fold({old_lows[i], old_highs[i]}, {lows_[i], highs_[i]}, args.update,
                               args.averaging_constant);
      lows_[i] = range.low;
      highs_[i] = range.high;
    }
  }

  int64_t groups() const { return layout_.groups; }
  const float* lows() { return lows_.data(); }
  const float* highs() { return highs_.data(); }

  void commit() {
    std::copy_n(lows_.data(), groups(), mutable_data<float>(args_.min_val));
    std::copy_n(highs_.data(), groups(), mutable_data<float>(args_.max_val));
    *mutable_data<int64_t>(args_.nonfinite_count) += nonfinite_;
  }

 private:
  const MinmaxArgs& args_;
  Layout layout_;
  Scratch<float> lows_, highs_;
  int64_t nonfinite_;
};

}  // namespace pyobserver
