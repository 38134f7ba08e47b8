// What the CPU and the CUDA glue of histogram share: its arguments and their checks.
#pragma once

#include "../../core/check.h"
#include "../minmax/minmax.h"
#include "histogram.h"

namespace pyobserver {

constexpr const char* kHistogram = "histogram";
constexpr const char* kHistogramCombine = "histogram_combine";

inline Combine parse_combine(const char* op, int64_t combine, int64_t upsample_rate) {
  check(upsample_rate >= 1 && upsample_rate <= 65536, op,
        ": upsample_rate: expected a value in [1, 65536], got ", upsample_rate);
  check(combine == 0 || combine == 1, op, ": combine: expected 0 (midpoint) or 1 (aligned), got ",
        combine);
  return static_cast<Combine>(combine);
}

inline void check_histogram(const char* op, const char* counts_name, const char* min_name,
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

struct HistogramArgs {
  DType dtype;
  Combine combine;
  Nonfinite nonfinite;
};

inline HistogramArgs parse_histogram(const Tensor& x, const Tensor& counts, const Tensor& min_val,
                                     const Tensor& max_val, const Tensor& nonfinite_count,
                                     int64_t combine, int64_t upsample_rate, int64_t nonfinite) {
  const DType dtype = input_dtype(kHistogram, "x", x);
  check_histogram(kHistogram, "counts", "min_val", "max_val", counts, min_val, max_val, x);
  check_state(kHistogram, "nonfinite_count", nonfinite_count, x, ScalarType::Long);
  check_numel(kHistogram, "nonfinite_count", nonfinite_count, 1);
  return {dtype, parse_combine(kHistogram, combine, upsample_rate),
          parse_nonfinite(kHistogram, nonfinite)};
}

inline Combine parse_histogram_combine(const Tensor& counts, const Tensor& min_val,
                                       const Tensor& max_val, const Tensor& other_counts,
                                       const Tensor& other_min_val, const Tensor& other_max_val,
                                       int64_t combine, int64_t upsample_rate) {
  constexpr const char* kOp = kHistogramCombine;
  check_histogram(kOp, "counts", "min_val", "max_val", counts, min_val, max_val, counts);
  check_histogram(kOp, "other_counts", "other_min_val", "other_max_val", other_counts,
                  other_min_val, other_max_val, counts);
  check_numel(kOp, "other_counts", other_counts, counts.numel());
  return parse_combine(kOp, combine, upsample_rate);
}

// Whether a state has seen no batch.
PYOBS_HD bool is_unfed(Range state) {
  return state.low == empty_range().low || state.high == empty_range().high;
}

}  // namespace pyobserver
