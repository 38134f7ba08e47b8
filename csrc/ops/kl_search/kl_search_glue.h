// What the glue of kl_search shares on the CPU and on CUDA.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "../../core/check.h"
#include "../../core/layout.h"
#include "kl_search.h"

namespace pyobserver {

constexpr const char* kKlSearch = "kl_search";

struct KlSearchArgs {
  const double* counts;
  int64_t histograms, bins, num_levels, start, stride;
};

inline KlSearchArgs parse_kl_search(const Tensor& counts, int64_t num_levels, int64_t start_bin,
                                    int64_t stride) {
  check_state(kKlSearch, "counts", counts, counts, ScalarType::Double);
  check(counts.dim() >= 1 && counts.size(counts.dim() - 1) >= 2 &&
            counts.size(counts.dim() - 1) < (1 << 30),
        kKlSearch, ": counts: expected shape (..., bins) with at least 2 bins, got ", counts.dim(),
        " dimensions and ", counts.numel(), " values");
  check(num_levels >= 2, kKlSearch, ": num_levels: expected at least 2, got ", num_levels);
  check(start_bin >= 1, kKlSearch, ": start_bin: expected at least 1, got ", start_bin);
  check(stride >= 1, kKlSearch, ": stride: expected at least 1, got ", stride);
  const int64_t bins = counts.size(counts.dim() - 1);
  return {const_data<double>(counts),
          counts.numel() / bins,
          bins,
          num_levels,
          std::min(start_bin, bins),
          stride};
}

// One int64 for each histogram.
inline Tensor empty_result(const Tensor& counts) {
  const int64_t dims = counts.dim() - 1;
  std::vector<int64_t> sizes(dims), strides(dims);
  int64_t step = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    sizes[d] = counts.size(d);
    strides[d] = step;
    step *= std::max<int64_t>(sizes[d], 1);
  }
  return empty_strided(counts, {sizes.data(), sizes.size()}, {strides.data(), strides.size()},
                       aoti_torch_dtype_int64());
}

}  // namespace pyobserver
