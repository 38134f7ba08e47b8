// CPU glue of range_search.
#include "range_search_glue.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "../../core/layout.h"
#include "../../core/parallel.h"

namespace pyobserver {
namespace {

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
  const RangeSearchArgs args = parse_range_search(counts, min_val, max_val, num_levels);
  const bool off = is_off(kRangeSearch, "enabled", enabled, counts);

  const Tensor new_min = empty_output(min_val, true);
  const Tensor new_max = empty_output(max_val, true);
  float* new_lows = mutable_data<float>(new_min);
  float* new_highs = mutable_data<float>(new_max);
  const int32_t bins = args.bins;
  const int64_t histograms = args.histograms;
  const auto& table = range_search_table();
  const std::vector<double> all_totals =
      off ? std::vector<double>(histograms) : totals(counts, histograms, bins);
  const auto search = [&](int64_t i, const SearchScratch& scratch) {
    FloatRange range = {args.lows[i], args.highs[i]};
    if (is_searchable(range, all_totals[i])) {
      const BinSpan span = table.greedy_l2(args.counts + i * bins, bins, bin_width_of(range, bins),
                                           all_totals[i], num_levels, scratch);
      range = range_of(range, bins, span);
    }
    new_lows[i] = range.low;
    new_highs[i] = range.high;
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
