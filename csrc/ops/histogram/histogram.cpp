// CPU glue of histogram and histogram_combine.
#include "histogram.h"

#include <algorithm>
#include <optional>

#include "../../core/check.h"
#include "../../core/layout.h"
#include "../../core/parallel.h"
#include "../minmax/minmax_glue.h"

namespace pyobserver {
namespace {

constexpr const char* kOp = "histogram";
constexpr const char* kOpCombine = "histogram_combine";

Combine parse_combine(const char* op, int64_t combine, int64_t upsample_rate) {
  check(upsample_rate >= 1 && upsample_rate <= 65536, op,
        ": upsample_rate: expected a value in [1, 65536], got ", upsample_rate);
  check(combine == 0 || combine == 1, op, ": combine: expected 0 (midpoint) or 1 (aligned), got ",
        combine);
  return static_cast<Combine>(combine);
}

void check_histogram(const char* op, const char* counts_name, const char* min_name,
                     const char* max_name, const Tensor& counts, const Tensor& min_val,
                     const Tensor& max_val, const Tensor& x) {
  check_state(op, counts_name, counts, x, ScalarType::Double);
  check(counts.dim() == 1 && counts.numel() >= 2 && counts.numel() < (1 << 30), op, ": ",
        counts_name, ": expected a 1-d tensor of at least 2 bins, got ", counts.numel(),
        " values in ", counts.dim(), " dimensions");
  check_state(op, min_name, min_val, x, ScalarType::Float);
  check_state(op, max_name, max_val, x, ScalarType::Float);
  check_numel(op, min_name, min_val, 1);
  check_numel(op, max_name, max_val, 1);
}

// Count is float or double: what the sums are rounded to, one part after the other as torch adds
// them. Where the parts of a new bin begin is found from its edge.
template <class Count>
void rebin_midpoint(const double* counts, int32_t bins, Range old_range, Range new_range,
                    int64_t upsample_rate, double* out) {
  const int64_t fine = bins * upsample_rate;
  const float narrow = (old_range.high - old_range.low) / static_cast<float>(fine);
  const double wide = static_cast<double>(old_range.high) / static_cast<double>(fine) -
                      static_cast<double>(old_range.low) / static_cast<double>(fine);
  const float part_width = is_finite(narrow) ? narrow : static_cast<float>(wide);
  const Linspace parts = linspace(old_range.low, old_range.high, fine + 1);
  const Linspace edges = linspace(new_range.low, new_range.high, bins + 1);
  const auto midpoint = [&](int64_t part) { return element(parts, part) + 0.5f * part_width; };
  const auto first_part = [&](int32_t bin, int64_t least) {  // whose midpoint is not below the bin
    const float edge = element(edges, bin);
    if (midpoint(least) >= edge) {  // as where float32 has one value for many edges
      return least;
    }
    const double guess = (static_cast<double>(edge) - parts.low) / parts.step - 0.5;
    int64_t part = least;
    if (guess > static_cast<double>(least)) {
      part = guess < static_cast<double>(fine) ? static_cast<int64_t>(guess) : fine;
    }
    while (part > least && midpoint(part - 1) >= edge) {
      --part;
    }
    while (part < fine && midpoint(part) < edge) {
      ++part;
    }
    return part;
  };
  int64_t part = 0;
  for (int32_t bin = 0; bin < bins; ++bin) {
    const int64_t end = bin + 1 < bins ? first_part(bin + 1, part) : fine;
    Count sum = 0;
    int64_t old_bin = part / upsample_rate;
    while (part < end) {
      const int64_t last = std::min(end, (old_bin + 1) * upsample_rate);
      const Count share = static_cast<Count>(counts[old_bin]) / static_cast<Count>(upsample_rate);
      for (; part < last; ++part) {
        sum += share;
      }
      ++old_bin;
    }
    out[bin] = static_cast<double>(sum);
  }
}

void rebin_aligned(const double* counts, int32_t bins, const AlignedGrid& grid,
                   int64_t upsample_rate, double* out) {
  Scratch<double, 0> before(bins + 1);
  before[0] = 0.0;
  for (int32_t i = 0; i < bins; ++i) {
    before[i + 1] = before[i] + counts[i];
  }
  double reached = aligned_cumulative(counts, before.data(), bins, upsample_rate, grid, 0);
  for (int32_t i = 0; i < bins; ++i) {
    const double next = aligned_cumulative(counts, before.data(), bins, upsample_rate, grid, i + 1);
    out[i] = next - reached;
    reached = next;
  }
}

// Up to so many values the counts are computed in float32, for the very numbers of torch.ao.
constexpr double kFloat32Counts = 1 << 24;

// The counts over old_range carried to new_range, whose high may be relaxed, into out.
void rebin(const double* counts, int32_t bins, Range old_range, Range* new_range, Combine combine,
           int64_t upsample_rate, bool narrow, double* out) {
  if (old_range.low == new_range->low && old_range.high == new_range->high) {
    std::copy_n(counts, bins, out);
  } else if (old_range.low == old_range.high) {
    const double total = histogram_table().sum(counts, bins);
    std::fill_n(out, bins, 0.0);
    out[bin_index(old_range.low, bin_grid(new_range->low, new_range->high, bins))] = total;
  } else if (combine == Combine::aligned) {
    const AlignedGrid grid = aligned_grid(old_range.low, old_range.high, new_range->low,
                                          new_range->high, bins, upsample_rate);
    new_range->high = grid.high;
    rebin_aligned(counts, bins, grid, upsample_rate, out);
  } else if (narrow) {
    rebin_midpoint<float>(counts, bins, old_range, *new_range, upsample_rate, out);
  } else {
    rebin_midpoint<double>(counts, bins, old_range, *new_range, upsample_rate, out);
  }
}

// The bins of a tensor: those of each thread by themselves, and where a tensor is long two of each,
// which take turns, so that equal values in a row need not wait for each other.
class BinCounts {
 public:
  BinCounts(const Layout& layout, int32_t bins)
      : layout_(layout),
        bins_(bins),
        stride_(row_stride(bins + 1, sizeof(uint32_t))),
        parts_(std::max(part_count(layout.numel), layout.numel / kMostOfPart + 1)),
        copies_(layout.numel / parts_ >= 16 * int64_t{bins} ? 2 : 1),
        counts_(parts_ * copies_ * stride_) {}

  // False where a finite value lies outside the range.
  bool count(DType dtype, const void* data, Range range) {
    const BinGrid grid = bin_grid(range.low, range.high, bins_);
    std::fill_n(counts_.data(), parts_ * copies_ * stride_, 0u);
    Scratch<bool> inside(parts_);
    for_each_part(layout_.numel, parts_, 64, [&](int64_t part, int64_t begin, int64_t end) {
      uint32_t* counts = counts_.data() + part * copies_ * stride_;
      bool all = true;
      layout_.for_each_span(data, element_size(dtype), begin, end,
                            [&](const void* x, int64_t, int64_t n, int64_t, int64_t) {
                              all = all &&
                                    histogram_table().bin(dtype, x, n, grid, range.low, range.high,
                                                          (copies_ - 1) * stride_, counts);
                            });
      inside[part] = all;
    });
    return std::all_of(inside.data(), inside.data() + parts_, [](bool all) { return all; });
  }

  int64_t nonfinite() {
    int64_t total = 0;
    for (int64_t row = 0; row < parts_ * copies_; ++row) {
      total += counts_[row * stride_ + bins_];
    }
    return layout_.repeat * total;
  }

  void add_to(double* counts, const double* carried, bool narrow) {
    histogram_table().add(counts, carried, counts_.data(), parts_ * copies_, stride_, bins_,
                          static_cast<double>(layout_.repeat), narrow);
  }

 private:
  static constexpr int64_t kMostOfPart = int64_t{1} << 31;  // values that 32 bits count
  const Layout& layout_;
  int32_t bins_;
  int64_t stride_, parts_, copies_;
  Scratch<uint32_t, 0> counts_;
};

void histogram(const Tensor& x, const Tensor& counts, const Tensor& min_val, const Tensor& max_val,
               const Tensor& nonfinite_count, int64_t combine_mode, int64_t upsample_rate,
               int64_t nonfinite_mode, std::optional<Tensor> enabled) {
  const DType dtype = input_dtype(kOp, "x", x);
  check_histogram(kOp, "counts", "min_val", "max_val", counts, min_val, max_val, x);
  check_state(kOp, "nonfinite_count", nonfinite_count, x, ScalarType::Long);
  check_numel(kOp, "nonfinite_count", nonfinite_count, 1);
  const Combine combine = parse_combine(kOp, combine_mode, upsample_rate);
  const Nonfinite nonfinite = parse_nonfinite(kOp, nonfinite_mode);
  if (is_off(kOp, "enabled", enabled, x) || x.numel() == 0) {
    return;
  }

  float* low = mutable_data<float>(min_val);
  float* high = mutable_data<float>(max_val);
  double* saved = mutable_data<double>(counts);
  int64_t* seen = mutable_data<int64_t>(nonfinite_count);
  const int32_t bins = static_cast<int32_t>(counts.numel());
  const Range state = {*low, *high};
  const Range unfed = empty_range();
  const bool first = state.low == unfed.low || state.high == unfed.high;
  const void* data = x.const_data_ptr();
  const Layout layout = Layout::of_reduction(x, {});
  BinCounts batch(layout, bins);
  const auto is_narrow = [&](int64_t count) {
    return histogram_table().sum(saved, bins) + static_cast<double>(x.numel() - count) <=
           kFloat32Counts;
  };

  // one pass while the range holds
  if (!first && is_finite(state.low) && is_finite(state.high) && batch.count(dtype, data, state)) {
    const int64_t count = batch.nonfinite();
    check_finite(kOp, nonfinite, count, x.numel());
    if (count == 0 || nonfinite == Nonfinite::ignore) {
      batch.add_to(saved, saved, is_narrow(count));
      *seen += count;
      return;
    }
  }

  Range found = empty_range();
  const int64_t count =
      group_ranges(dtype, data, layout, nonfinite == Nonfinite::ignore, &found.low, &found.high);
  check_finite(kOp, nonfinite, count, x.numel());
  Range range = merge(state, canonical(found));
  // no histogram over a range that is empty or, with "propagate", not finite
  if (is_finite(range.low) && is_finite(range.high)) {
    if (first) {
      batch.count(dtype, data, range);
      batch.add_to(saved, nullptr, false);
    } else {
      const bool narrow = is_narrow(count);
      Scratch<double, 0> carried(bins);
      rebin(saved, bins, state, &range, combine, upsample_rate, narrow, carried.data());
      batch.count(dtype, data, range);
      batch.add_to(saved, carried.data(), narrow);
    }
  }
  *low = range.low;
  *high = range.high;
  *seen += count;
}

void histogram_combine(const Tensor& counts, const Tensor& min_val, const Tensor& max_val,
                       const Tensor& other_counts, const Tensor& other_min_val,
                       const Tensor& other_max_val, int64_t combine_mode, int64_t upsample_rate) {
  check_histogram(kOpCombine, "counts", "min_val", "max_val", counts, min_val, max_val, counts);
  check_histogram(kOpCombine, "other_counts", "other_min_val", "other_max_val", other_counts,
                  other_min_val, other_max_val, counts);
  check_numel(kOpCombine, "other_counts", other_counts, counts.numel());
  const Combine combine = parse_combine(kOpCombine, combine_mode, upsample_rate);

  float* low = mutable_data<float>(min_val);
  float* high = mutable_data<float>(max_val);
  double* saved = mutable_data<double>(counts);
  const double* added = const_data<double>(other_counts);
  const int32_t bins = static_cast<int32_t>(counts.numel());
  const Range state = {*low, *high};
  const Range other = {*const_data<float>(other_min_val), *const_data<float>(other_max_val)};
  if (is_empty(other)) {
    return;
  }
  Range range = merge(state, other);
  if (!is_finite(range.low) || !is_finite(range.high)) {  // the counts stay as they were
    *low = range.low;
    *high = range.high;
    return;
  }
  const auto sum = histogram_table().sum;
  const bool narrow = sum(saved, bins) + sum(added, bins) <= kFloat32Counts;
  Scratch<double, 0> carried(bins), other_carried(bins);
  if (is_empty(state)) {
    std::fill_n(carried.data(), bins, 0.0);
  } else {
    rebin(saved, bins, state, &range, combine, upsample_rate, narrow, carried.data());
  }
  // the first has settled the range; the other follows by its midpoints
  rebin(added, bins, other, &range, Combine::midpoint, upsample_rate, narrow, other_carried.data());
  for (int32_t i = 0; i < bins; ++i) {
    const double total = carried[i] + other_carried[i];
    saved[i] = narrow ? static_cast<double>(static_cast<float>(total)) : total;
  }
  *low = range.low;
  *high = range.high;
}

}  // namespace
}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CPU, m) {
  m.impl("histogram", TORCH_BOX(&pyobserver::histogram));
  m.impl("histogram_combine", TORCH_BOX(&pyobserver::histogram_combine));
}
