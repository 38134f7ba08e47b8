// CPU glue of histogram and histogram_combine.
#include <algorithm>
#include <optional>

#include "../../core/parallel.h"
#include "../minmax/minmax_glue.h"
#include "histogram_glue.h"

namespace pyobserver {
namespace {

template <class Count>
void rebin_midpoint(const double* counts, const MidpointGrid& grid, double* out) {
  int64_t part = 0;
  for (int32_t bin = 0; bin < grid.bins; ++bin) {
    const int64_t end = bin + 1 < grid.bins ? first_part(grid, bin + 1, part) : grid.fine;
    out[bin] = sum_of_parts<Count>(counts, grid.upsample_rate, part, end);
    part = end;
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
  } else {
    const MidpointGrid grid = midpoint_grid(old_range.low, old_range.high, new_range->low,
                                            new_range->high, bins, upsample_rate);
    narrow ? rebin_midpoint<float>(counts, grid, out) : rebin_midpoint<double>(counts, grid, out);
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
  const HistogramArgs args = parse_histogram(x, counts, min_val, max_val, nonfinite_count,
                                             combine_mode, upsample_rate, nonfinite_mode);
  const auto [dtype, combine, nonfinite] = args;
  if (is_off(kHistogram, "enabled", enabled, x) || x.numel() == 0) {
    return;
  }

  float* low = mutable_data<float>(min_val);
  float* high = mutable_data<float>(max_val);
  double* saved = mutable_data<double>(counts);
  int64_t* seen = mutable_data<int64_t>(nonfinite_count);
  const int32_t bins = static_cast<int32_t>(counts.numel());
  const Range state = {*low, *high};
  const bool first = is_unfed(state);
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
    check_finite(kHistogram, nonfinite, count, x.numel());
    if (count == 0 || nonfinite == Nonfinite::ignore) {
      batch.add_to(saved, saved, is_narrow(count));
      *seen += count;
      return;
    }
  }

  Range found = empty_range();
  const int64_t count =
      group_ranges(dtype, data, layout, nonfinite == Nonfinite::ignore, &found.low, &found.high);
  check_finite(kHistogram, nonfinite, count, x.numel());
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
  const Combine combine =
      parse_histogram_combine(counts, min_val, max_val, other_counts, other_min_val, other_max_val,
                              combine_mode, upsample_rate);

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
