// CPU glue of lp_search and lp_error.
#include "lp_search_glue.h"

#include <algorithm>
#include <memory>
#include <optional>

#include "../../core/parallel.h"
#include "../histogram/histogram.h"

namespace pyobserver {
namespace {

// Calls body(i, histogram, total, room) for each over torch's threads; total: of its counts, 0
// where it has none or a range that is not finite.
template <class Body>
void for_each_histogram(const LpHistograms& all, const Body& body) {
  const int64_t parts =
      std::min<int64_t>(all.count, static_cast<int64_t>(torch::stable::get_num_threads()));
  if (parts == 0) {
    return;
  }
  const int64_t size = lp_room(all.bins);
  const std::unique_ptr<double[]> rooms(new double[parts * size]);
  for_each_part(all.count, parts, 1, [&](int64_t part, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const LpHistogram histogram = histogram_at(all, i);
      const double total =
          has_range(histogram) ? histogram_table().sum(histogram.counts, all.bins) : 0.0;
      body(i, histogram, total, &rooms[part * size]);
    }
  });
}

void lp_search(const Tensor& counts, const Tensor& edges, const Tensor& min_val,
               const Tensor& max_val, const Tensor& scale, const Tensor& zero_point,
               const Tensor& error, int64_t quant_min, int64_t quant_max, double p,
               std::optional<int64_t> fixed_zero_point, int64_t constraint,
               std::optional<Tensor> eps, std::optional<Tensor> enabled) {
  const LpSearchArgs args =
      parse_lp_search(counts, edges, min_val, max_val, scale, zero_point, error, quant_min,
                      quant_max, p, fixed_zero_point, constraint, eps);
  if (is_off(kLpSearch, "enabled", enabled, counts)) {
    return;
  }
  const LpGoal goal = goal_of(args);
  for_each_histogram(
      args.histograms, [&](int64_t i, const LpHistogram& histogram, double total, double* room) {
        const LpChoice choice =
            total > 0.0 ? lp_search_table().search(histogram, goal, room) : LpChoice{};
        write_choice(args, i, choice, total);
      });
}

Tensor lp_error(const Tensor& counts, const Tensor& edges, const Tensor& min_val,
                const Tensor& max_val, const Tensor& scale, const Tensor& zero_point,
                int64_t quant_min, int64_t quant_max, double p) {
  const LpErrorArgs args =
      parse_lp_error(counts, edges, min_val, max_val, scale, zero_point, quant_min, quant_max, p);
  const Tensor error = empty_errors(counts);
  double* errors = mutable_data<double>(error);
  for_each_histogram(
      args.histograms, [&](int64_t i, const LpHistogram& histogram, double total, double* room) {
        const LpAsked asked = asked_of(args, i);
        const LpErrors found = total > 0.0 && asked.usable
                                   ? lp_search_table().errors(histogram, asked.scale, asked.below,
                                                              asked.above, p, room)
                                   : no_errors(total);
        write_errors(found, total, errors + kLpErrors * i);
      });
  return error;
}

}  // namespace
}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CPU, m) {
  m.impl("lp_search", TORCH_BOX(&pyobserver::lp_search));
  m.impl("lp_error", TORCH_BOX(&pyobserver::lp_error));
}
