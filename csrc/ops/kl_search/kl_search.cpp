// CPU glue of kl_search.
#include "kl_search_glue.h"

#include <algorithm>
#include <memory>
#include <optional>

#include "../../core/parallel.h"

namespace pyobserver {
namespace {

Tensor kl_search(const Tensor& counts, int64_t num_levels, int64_t start_bin, int64_t stride,
                 std::optional<Tensor> enabled) {
  const KlSearchArgs args = parse_kl_search(counts, num_levels, start_bin, stride);
  const bool off = is_off(kKlSearch, "enabled", enabled, counts);
  const Tensor result = empty_result(counts);
  const int64_t bins = args.bins, histograms = args.histograms;
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
        kept[i] = table.search(args.counts + i * bins, bins, args.num_levels, args.start,
                               args.stride, scratch);
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
