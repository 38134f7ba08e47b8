// What the CPU and the CUDA glue of log_histogram share: its arguments and their checks.
#pragma once

#include <optional>
#include <vector>

#include "../../core/check.h"
#include "../../core/layout.h"
#include "log_histogram.h"

namespace pyobserver {

constexpr const char* kLogHistogram = "log_histogram";

// A row of counts for each group; k follows from the size of a row.
inline LogBins check_log_counts(const Tensor& counts, const Tensor& x, const Grouping& grouping) {
  check_state(kLogHistogram, "counts", counts, x, ScalarType::Long);
  const int64_t rows_dim = counts.dim() - 1;
  const int64_t columns = rows_dim >= 0 ? counts.size(rows_dim) : 0;
  int bits = 0;
  while (bits < kMostMantissaBits && columns_of(log_bins(bits)) < columns) {
    ++bits;
  }
  const LogBins bins = log_bins(bits);
  check(columns_of(bins) == columns, kLogHistogram,
        ": counts: expected a last size of 2 * (255 << k) + 4 for a k in [0, ", kMostMantissaBits,
        "], got ", columns);
  bool fits = true;
  if (grouping.block_size == nullptr && grouping.axis < 0) {
    // an axis of an empty tensor is not looked at
    fits = x.numel() == 0 || rows_dim == 0 || (rows_dim == 1 && counts.size(0) == 1);
  } else if (grouping.block_size == nullptr) {
    fits = rows_dim == 1 && counts.size(0) == x.size(grouping.axis);
  } else if (x.numel() > 0) {
    fits = rows_dim == x.dim();
    for (int64_t d = 0; fits && d < x.dim(); ++d) {
      fits = counts.size(d) == x.size(d) / (*grouping.block_size)[d];
    }
  }
  check(fits, kLogHistogram, ": counts: expected a row of ", columns, " for each group of x, got ",
        counts.numel(), " values in ", counts.dim(), " dimensions");
  return bins;
}

struct LogHistogramArgs {
  DType dtype;
  Grouping grouping;
  LogBins bins;
  Nonfinite nonfinite;
};

inline LogHistogramArgs parse_log_histogram(const Tensor& x, const Tensor& counts,
                                            const Tensor& min_val, const Tensor& max_val,
                                            const std::optional<int64_t>& axis, int64_t nonfinite,
                                            const std::optional<std::vector<int64_t>>& block_size) {
  const DType dtype = input_dtype(kLogHistogram, "x", x);
  const Grouping grouping = parse_grouping(kLogHistogram, x, axis, block_size);
  const LogBins bins = check_log_counts(counts, x, grouping);
  check_state(kLogHistogram, "min_val", min_val, x, ScalarType::Float);
  check_state(kLogHistogram, "max_val", max_val, x, ScalarType::Float);
  const Nonfinite mode = parse_nonfinite(kLogHistogram, nonfinite);
  if (x.numel() > 0) {
    check_groups(kLogHistogram, "min_val", min_val, x, grouping);
    check_groups(kLogHistogram, "max_val", max_val, x, grouping);
  }
  return {dtype, grouping, bins, mode};
}

}  // namespace pyobserver
