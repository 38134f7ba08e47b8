// CPU glue of histogram and histogram_combine.
#include "histogram.h"

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "../../core/check.h"
#include "../../core/dense.h"
#include "../minmax/minmax_glue.h"

namespace pyobserver {
namespace {

constexpr const char* kOp = "histogram";
constexpr const char* kOpCombine = "histogram_combine";

Combine parse_combine(const char* op, const std::string& name, int64_t upsample_rate) {
  check(upsample_rate >= 1 && upsample_rate <= 65536, op,
        ": upsample_rate: expected a value in [1, 65536], got ", upsample_rate);
  if (name == "midpoint") {
    return Combine::midpoint;
  }
  check(name == "aligned", op, ": combine: expected one of midpoint, aligned, got '", name, "'");
  return Combine::aligned;
}

void check_histogram(const char* op, const std::string& prefix, const Tensor& counts,
                     const Tensor& min_val, const Tensor& max_val, const Tensor& x) {
  check_state(op, (prefix + "counts").c_str(), counts, x, ScalarType::Double);
  check(counts.dim() == 1 && counts.numel() >= 2 && counts.numel() < (1 << 30), op, ": ", prefix,
        "counts: expected a 1-d tensor of at least 2 bins, got ", counts.numel(), " values in ",
        counts.dim(), " dimensions");
  check_state(op, (prefix + "min_val").c_str(), min_val, x, ScalarType::Float);
  check_state(op, (prefix + "max_val").c_str(), max_val, x, ScalarType::Float);
  check_numel(op, (prefix + "min_val").c_str(), min_val, 1);
  check_numel(op, (prefix + "max_val").c_str(), max_val, 1);
}

// Count is float or double: what the sums are rounded to.
template <class Count>
void rebin_midpoint(const std::vector<double>& counts, Range old_range, Range new_range,
                    int64_t upsample_rate, std::vector<double>* out) {
  const int64_t bins = static_cast<int64_t>(counts.size());
  const int64_t fine = bins * upsample_rate;
  const float narrow = (old_range.high - old_range.low) / static_cast<float>(fine);
  const float part_width = is_finite(narrow)
                               ? narrow
                               : static_cast<float>(static_cast<double>(old_range.high) / fine -
                                                    static_cast<double>(old_range.low) / fine);
  const Linspace parts = linspace(old_range.low, old_range.high, fine + 1);
  const Linspace edges = linspace(new_range.low, new_range.high, bins + 1);
  std::vector<Count> sums(bins, Count(0));
  int64_t bin = 0;  // midpoints and edges both ascend
  float upper_edge = element(edges, 1);
  for (int64_t i = 0; i < fine; ++i) {
    const float midpoint = element(parts, i) + 0.5f * part_width;
    while (bin < bins - 1 && upper_edge <= midpoint) {
      ++bin;
      upper_edge = element(edges, bin + 1);
    }
    sums[bin] += static_cast<Count>(counts[i / upsample_rate]) / static_cast<Count>(upsample_rate);
  }
  for (int64_t i = 0; i < bins; ++i) {
    (*out)[i] = static_cast<double>(sums[i]);
  }
}

void rebin_aligned(const std::vector<double>& counts, const AlignedGrid& grid,
                   int64_t upsample_rate, std::vector<double>* out) {
  const int32_t bins = static_cast<int32_t>(counts.size());
  std::vector<double> before(bins + 1, 0.0);
  for (int32_t i = 0; i < bins; ++i) {
    before[i + 1] = before[i] + counts[i];
  }
  double reached = aligned_cumulative(counts.data(), before.data(), bins, upsample_rate, grid, 0);
  for (int32_t i = 0; i < bins; ++i) {
    const double next =
        aligned_cumulative(counts.data(), before.data(), bins, upsample_rate, grid, i + 1);
    (*out)[i] = next - reached;
    reached = next;
  }
}

double sum_of(const std::vector<double>& counts) {
  constexpr size_t kLanes = 8;  // one sum after another would wait for each addition
  double sums[kLanes] = {};
  for (size_t i = 0; i < counts.size(); ++i) {
    sums[i % kLanes] += counts[i];
  }
  double total = 0.0;
  for (double sum : sums) {
    total += sum;
  }
  return total;
}

// Up to so many values the counts are computed in float32, for the very numbers of torch.ao.
constexpr double kFloat32Counts = 1 << 24;

// The counts over old_range carried to new_range, whose high may be relaxed.
std::vector<double> rebin(const std::vector<double>& counts, Range old_range, Range* new_range,
                          Combine combine, int64_t upsample_rate, bool narrow) {
  if (old_range.low == new_range->low && old_range.high == new_range->high) {
    return counts;
  }
  const int32_t bins = static_cast<int32_t>(counts.size());
  std::vector<double> carried(bins, 0.0);
  if (old_range.low == old_range.high) {
    const BinGrid grid = bin_grid(new_range->low, new_range->high, bins);
    carried[bin_index(old_range.low, grid)] = sum_of(counts);
  } else if (combine == Combine::aligned) {
    const AlignedGrid grid = aligned_grid(old_range.low, old_range.high, new_range->low,
                                          new_range->high, bins, upsample_rate);
    new_range->high = grid.high;
    rebin_aligned(counts, grid, upsample_rate, &carried);
  } else if (narrow) {
    rebin_midpoint<float>(counts, old_range, *new_range, upsample_rate, &carried);
  } else {
    rebin_midpoint<double>(counts, old_range, *new_range, upsample_rate, &carried);
  }
  return carried;
}

// carried + added, as floats where they are few.
void write_sum(const std::vector<double>& carried, const std::vector<double>& added, bool narrow,
               double* out) {
  for (size_t i = 0; i < carried.size(); ++i) {
    const double sum = carried[i] + added[i];
    out[i] = narrow ? static_cast<double>(static_cast<float>(sum)) : sum;
  }
}

std::vector<double> bin_counts(DType dtype, const DenseInput& input, Range range, int64_t bins) {
  const int64_t parts = part_count(input.inner);
  const auto* data = static_cast<const char*>(input.tensor.const_data_ptr());
  const BinGrid grid = bin_grid(range.low, range.high, static_cast<int32_t>(bins));
  const int64_t row = bins + 1;  // the last takes what is not finite
  std::vector<int64_t> counts(parts * row);
  for_each_part(input.inner, parts, 64, [&](int64_t part, int64_t begin, int64_t end) {
    histogram_table().bin(dtype, data + begin * element_size(dtype), end - begin, grid,
                          &counts[part * row]);
  });
  std::vector<double> total(bins, 0.0);
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t i = 0; i < bins; ++i) {
      total[i] += static_cast<double>(counts[part * row + i]);
    }
  }
  return total;
}

void histogram(const Tensor& x, const Tensor& counts, const Tensor& min_val, const Tensor& max_val,
               const Tensor& nonfinite_count, std::string combine_name, int64_t upsample_rate,
               std::string nonfinite_name, std::optional<Tensor> enabled) {
  const DType dtype = input_dtype(kOp, "x", x);
  check_histogram(kOp, "", counts, min_val, max_val, x);
  check_state(kOp, "nonfinite_count", nonfinite_count, x, ScalarType::Long);
  check_numel(kOp, "nonfinite_count", nonfinite_count, 1);
  const Combine combine = parse_combine(kOp, combine_name, upsample_rate);
  const Nonfinite nonfinite = parse_nonfinite(kOp, nonfinite_name);
  if (is_off(kOp, enabled, x) || x.numel() == 0) {
    return;
  }

  const DenseInput input(x, -1);
  int64_t count = 0;
  const Range batch =
      positive_zeros(tensor_range(dtype, input, nonfinite == Nonfinite::ignore, &count));
  check_finite(kOp, nonfinite, count, x.numel());

  float* low = min_val.mutable_data_ptr<float>();
  float* high = max_val.mutable_data_ptr<float>();
  double* saved = counts.mutable_data_ptr<double>();
  const Range unfed = empty_range();
  const Range state = {*low, *high};
  const bool first = state.low == unfed.low || state.high == unfed.high;
  Range range = merge(state, batch);
  // no histogram over a range that is empty or, with "propagate", not finite
  if (is_finite(range.low) && is_finite(range.high)) {
    std::vector<double> carried(counts.numel(), 0.0);
    bool narrow = true;
    if (!first) {
      const std::vector<double> old(saved, saved + counts.numel());
      narrow = sum_of(old) + static_cast<double>(x.numel() - count) <= kFloat32Counts;
      carried = rebin(old, state, &range, combine, upsample_rate, narrow);
    }
    write_sum(carried, bin_counts(dtype, input, range, counts.numel()), !first && narrow, saved);
  }
  *low = range.low;
  *high = range.high;
  *nonfinite_count.mutable_data_ptr<int64_t>() += count;
}

void histogram_combine(const Tensor& counts, const Tensor& min_val, const Tensor& max_val,
                       const Tensor& other_counts, const Tensor& other_min_val,
                       const Tensor& other_max_val, std::string combine_name,
                       int64_t upsample_rate) {
  check_histogram(kOpCombine, "", counts, min_val, max_val, counts);
  check_histogram(kOpCombine, "other_", other_counts, other_min_val, other_max_val, counts);
  check_numel(kOpCombine, "other_counts", other_counts, counts.numel());
  const Combine combine = parse_combine(kOpCombine, combine_name, upsample_rate);

  float* low = min_val.mutable_data_ptr<float>();
  float* high = max_val.mutable_data_ptr<float>();
  double* saved = counts.mutable_data_ptr<double>();
  const double* other_saved = other_counts.const_data_ptr<double>();
  const Range state = {*low, *high};
  const Range other = {*other_min_val.const_data_ptr<float>(),
                       *other_max_val.const_data_ptr<float>()};
  if (is_empty(other)) {
    return;
  }
  Range range = merge(state, other);
  if (!is_finite(range.low) || !is_finite(range.high)) {  // the counts stay as they were
    *low = range.low;
    *high = range.high;
    return;
  }
  const std::vector<double> added(other_saved, other_saved + counts.numel());
  const std::vector<double> old(saved, saved + counts.numel());
  const bool narrow = sum_of(old) + sum_of(added) <= kFloat32Counts;
  std::vector<double> carried(counts.numel(), 0.0);
  if (!is_empty(state)) {
    carried = rebin(old, state, &range, combine, upsample_rate, narrow);
  }
  // the first has settled the range; the other follows by its midpoints
  write_sum(carried, rebin(added, other, &range, Combine::midpoint, upsample_rate, narrow), narrow,
            saved);
  *low = range.low;
  *high = range.high;
}

}  // namespace
}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CPU, m) {
  m.impl("histogram", TORCH_BOX(&pyobserver::histogram));
  m.impl("histogram_combine", TORCH_BOX(&pyobserver::histogram_combine));
}
