// What the glue of range_search shares on the CPU and on CUDA.
#pragma once

#include <optional>
#include <tuple>

#include "../../core/check.h"
#include "range_search.h"

namespace pyobserver {

constexpr const char* kRangeSearch = "range_search";

// Above this size torch would sum in an order that depends on its threads.
constexpr int32_t kMostBinsForTorchSum = 16384;

struct RangeSearchArgs {
  int64_t histograms;
  int32_t bins;
  const double* counts;
  const float *lows, *highs;
};

inline RangeSearchArgs parse_range_search(const Tensor& counts, const Tensor& min_val,
                                          const Tensor& max_val, int64_t num_levels) {
  check_state(kRangeSearch, "counts", counts, counts, ScalarType::Double);
  check(counts.dim() >= 1 && counts.size(counts.dim() - 1) >= 2 &&
            counts.size(counts.dim() - 1) < (1 << 30),
        kRangeSearch, ": counts: expected shape (..., bins) with at least 2 bins, got ",
        counts.dim(), " dimensions and ", counts.numel(), " values");
  const int32_t bins = static_cast<int32_t>(counts.size(counts.dim() - 1));
  const int64_t histograms = counts.numel() / bins;
  check_state(kRangeSearch, "min_val", min_val, counts, ScalarType::Float);
  check_state(kRangeSearch, "max_val", max_val, counts, ScalarType::Float);
  check_numel(kRangeSearch, "min_val", min_val, histograms);
  check_numel(kRangeSearch, "max_val", max_val, histograms);
  check(num_levels >= 2, kRangeSearch, ": num_levels: expected at least 2, got ", num_levels);
  return {histograms, bins, const_data<double>(counts), const_data<float>(min_val),
          const_data<float>(max_val)};
}

}  // namespace pyobserver
