// CPU glue of range_search.
#include "range_search.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "../../core/check.h"
#include "../../core/layout.h"
#include "../../core/parallel.h"

namespace pyobserver {
namespace {

constexpr const char* kOp = "range_search";

// Above this size torch would sum in an order that depends on its threads.
constexpr int32_t kMostBinsForTorchSum = 16384;

// The totals as torch.sum of float32 counts gives them, in an order that depends on the vectors
// torch was built for: the search compares quantiles of it with cumulative counts, and a total one
// rounding off moves it to other bins than torch.ao's.
std::vector<double> totals(const Tensor& counts, int64_t histograms, int32_t bins) {
  std::vector<double> result(histograms);
  if (bins > kMostBinsForTorchSum) {
    const double* all_counts = const_data<double>(counts);
    for (int64_t i = 0; i < histograms * bins; ++i) {
      result[i / bins] += all_counts[i];
    }
  } else if (histograms > 0) {
    // a row is summed as if it were alone
    const int64_t last = -1;
    const Tensor sums = torch::stable::sum(counts, {{&last, 1}}, false, ScalarType::Float);
    const float* all_sums = const_data<float>(sums);
    std::copy(all_sums, all_sums + histograms, result.begin());
  }
  return result;
}

std::tuple<Tensor, Tensor> range_search(const Tensor& counts, const Tensor& min_val,
                                        const Tensor& max_val, int64_t num_levels,
                                        std::optional<Tensor> enabled) {
  check_state(kOp, "counts", counts, counts, ScalarType::Double);
  check(counts.dim() >= 1 && counts.size(counts.dim() - 1) >= 2 &&
            counts.size(counts.dim() - 1) < (1 << 30),
        kOp, ": counts: expected shape (..., bins) with at least 2 bins, got ", counts.dim(),
        " dimensions and ", counts.numel(), " values");
  const int32_t bins = static_cast<int32_t>(counts.size(counts.dim() - 1));
  const int64_t histograms = counts.numel() / bins;
  check_state(kOp, "min_val", min_val, counts, ScalarType::Float);
  check_state(kOp, "max_val", max_val, counts, ScalarType::Float);
  check_numel(kOp, "min_val", min_val, histograms);
  check_numel(kOp, "max_val", max_val, histograms);
  check(num_levels >= 2, kOp, ": num_levels: expected at least 2, got ", num_levels);
  const bool off = is_off(kOp, "enabled", enabled, counts);

  const Tensor new_min = empty_output(min_val, true);
  const Tensor new_max = empty_output(max_val, true);
  const double* all_counts = const_data<double>(counts);
  const float* lows = const_data<float>(min_val);
  const float* highs = const_data<float>(max_val);
  float* new_lows = mutable_data<float>(new_min);
  float* new_highs = mutable_data<float>(new_max);
  const auto& table = range_search_table();
  const std::vector<double> all_totals =
      off ? std::vector<double>(histograms) : totals(counts, histograms, bins);
  const auto search = [&](int64_t i, const SearchScratch& scratch) {
    new_lows[i] = lows[i];
    new_highs[i] = highs[i];
    if (off || !is_finite(lows[i]) || !is_finite(highs[i]) || !(lows[i] < highs[i]) ||
        !(all_totals[i] > 0.0)) {
      return;
    }
    const double width = (static_cast<double>(highs[i]) - static_cast<double>(lows[i])) / bins;
    const BinSpan span =
        table.greedy_l2(all_counts + i * bins, bins, width, all_totals[i], num_levels, scratch);
    const float step = (highs[i] - lows[i]) / static_cast<float>(bins);
    if (is_finite(step)) {
      new_lows[i] = lows[i] + step * static_cast<float>(span.first);
      new_highs[i] = lows[i] + step * static_cast<float>(span.last + 1);
    } else {  // a width above the greatest float32
      new_lows[i] = static_cast<float>(static_cast<double>(lows[i]) + width * span.first);
      new_highs[i] = static_cast<float>(static_cast<double>(lows[i]) + width * (span.last + 1));
    }
  };
  const int64_t parts =
      std::min<int64_t>(histograms, static_cast<int64_t>(torch::stable::get_num_threads()));
  if (parts > 0) {
    const int64_t room = bins + kSearchPadding;
    const std::unique_ptr<float[]> floats(new float[parts * room * 2]);
    const std::unique_ptr<int32_t[]> ints(new int32_t[parts * room]);
    for_each_part(histograms, parts, 1, [&](int64_t part, int64_t begin, int64_t end) {
      float* const cumulative = &floats[part * room * 2];
      const SearchScratch scratch = {cumulative, cumulative + room, &ints[part * room]};
      for (int64_t i = begin; i < end; ++i) {
        search(i, scratch);
      }
    });
  }
  return {new_min, new_max};
}

}  // namespace
}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CPU, m) {
  m.impl("range_search", TORCH_BOX(&pyobserver::range_search));
}
