// CPU glue of kl_search.
#include "kl_search.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "../../core/check.h"
#include "../../core/layout.h"
#include "../../core/parallel.h"

namespace pyobserver {
namespace {

constexpr const char* kOp = "kl_search";

// One int64 for each histogram.
Tensor empty_result(const Tensor& counts) {
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

Tensor kl_search(const Tensor& counts, int64_t num_levels, int64_t start_bin, int64_t stride,
                 std::optional<Tensor> enabled) {
  check_state(kOp, "counts", counts, counts, ScalarType::Double);
  check(counts.dim() >= 1 && counts.size(counts.dim() - 1) >= 2 &&
            counts.size(counts.dim() - 1) < (1 << 30),
        kOp, ": counts: expected shape (..., bins) with at least 2 bins, got ", counts.dim(),
        " dimensions and ", counts.numel(), " values");
  check(num_levels >= 2, kOp, ": num_levels: expected at least 2, got ", num_levels);
  check(start_bin >= 1, kOp, ": start_bin: expected at least 1, got ", start_bin);
  check(stride >= 1, kOp, ": stride: expected at least 1, got ", stride);
  const bool off = is_off(kOp, "enabled", enabled, counts);

  const int64_t bins = counts.size(counts.dim() - 1);
  const int64_t histograms = counts.numel() / bins;
  const int64_t start = std::min(start_bin, bins);
  const Tensor result = empty_result(counts);
  const double* all_counts = const_data<double>(counts);
  auto* kept = mutable_data<int64_t>(result);
  if (off) {
    std::fill(kept, kept + histograms, bins);
    return result;
  }
  const int64_t parts =
      std::min<int64_t>(histograms, static_cast<int64_t>(torch::stable::get_num_threads()));
  if (parts > 0) {
    const auto& table = kl_search_table();
    const int64_t room = bins + 1;
    const std::unique_ptr<KlSums[]> sums(new KlSums[parts * room]);
    const std::unique_ptr<double[]> divergences(new double[parts * room]);
    for_each_part(histograms, parts, 1, [&](int64_t part, int64_t begin, int64_t end) {
      const KlScratch scratch = {&sums[part * room], &divergences[part * room]};
      for (int64_t i = begin; i < end; ++i) {
        kept[i] = table.search(all_counts + i * bins, bins, num_levels, start, stride, scratch);
      }
    });
  }
  return result;
}

}  // namespace
}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CPU, m) {
  m.impl("kl_search", TORCH_BOX(&pyobserver::kl_search));
}
