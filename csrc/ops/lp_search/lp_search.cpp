// CPU glue of lp_search and lp_error.
#include "lp_search.h"

#include <algorithm>
#include <memory>
#include <optional>

#include "../../core/check.h"
#include "../../core/layout.h"
#include "../../core/parallel.h"
#include "../histogram/histogram.h"

namespace pyobserver {
namespace {

constexpr const char* kOpSearch = "lp_search";
constexpr const char* kOpError = "lp_error";
constexpr int64_t kErrors = 3;  // clipping, rounding, signal

// The checked histograms of an op, one after the other.
class Histograms {
 public:
  Histograms(const char* op, const Tensor& counts, const Tensor& edges, const Tensor& min_val,
             const Tensor& max_val) {
    check_state(op, "counts", counts, counts, ScalarType::Double);
    check(counts.dim() >= 1 && counts.size(counts.dim() - 1) >= 1 &&
              counts.size(counts.dim() - 1) < (1 << 30),
          op, ": counts: expected shape (..., bins) with at least 1 bin, got ", counts.dim(),
          " dimensions and ", counts.numel(), " values");
    bins_ = static_cast<int32_t>(counts.size(counts.dim() - 1));
    count_ = counts.numel() / bins_;
    check_state(op, "edges", edges, counts, ScalarType::Double);
    check(edges.numel() == bins_ + 1 || edges.numel() == count_ * (bins_ + 1), op,
          ": edges: expected ", bins_ + 1, " for all histograms or for each, got ", edges.numel());
    check_state(op, "min_val", min_val, counts, ScalarType::Float);
    check_state(op, "max_val", max_val, counts, ScalarType::Float);
    check_numel(op, "min_val", min_val, count_);
    check_numel(op, "max_val", max_val, count_);
    shared_edges_ = edges.numel() == bins_ + 1;
    counts_ = const_data<double>(counts);
    edges_ = const_data<double>(edges);
    lows_ = const_data<float>(min_val);
    highs_ = const_data<float>(max_val);
  }

  int64_t count() const { return count_; }

  // Calls body(i, histogram, total, room) for each over torch's threads; total: of its counts, 0
  // where it has none or a range that is not finite.
  template <class Body>
  void for_each(const Body& body) const {
    const int64_t parts =
        std::min<int64_t>(count_, static_cast<int64_t>(torch::stable::get_num_threads()));
    if (parts == 0) {
      return;
    }
    const int64_t size = lp_room(bins_);
    const std::unique_ptr<double[]> rooms(new double[parts * size]);
    for_each_part(count_, parts, 1, [&](int64_t part, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const LpHistogram histogram = {counts_ + i * bins_,
                                       edges_ + (shared_edges_ ? 0 : i * (bins_ + 1)), bins_,
                                       lows_[i], highs_[i]};
        const bool fed = is_finite(lows_[i]) && is_finite(highs_[i]) && lows_[i] <= highs_[i];
        body(i, histogram, fed ? histogram_table().sum(histogram.counts, bins_) : 0.0,
             &rooms[part * size]);
      }
    });
  }

 private:
  int32_t bins_;
  int64_t count_;
  bool shared_edges_;
  const double *counts_, *edges_;
  const float *lows_, *highs_;
};

void check_p(const char* op, double p) {
  check(p > 0.0 && p <= 6.0, op, ": p: expected a value in (0, 6], got ", p);
}

ScalarType check_zero_point(const char* op, const Tensor& zero_point, const Tensor& counts,
                            int64_t count) {
  const ScalarType dtype = dtype_of(zero_point);
  check(dtype == ScalarType::Int || dtype == ScalarType::Long, op,
        ": zero_point: expected int32 or int64, got ", torch::headeronly::toString(dtype));
  check_state(op, "zero_point", zero_point, counts, dtype);
  check_numel(op, "zero_point", zero_point, count);
  return dtype;
}

// Means over the values.
void write_errors(const LpErrors& errors, double total, double* out) {
  out[0] = errors.clipping / total;
  out[1] = errors.rounding / total;
  out[2] = errors.signal / total;
}

void lp_search(const Tensor& counts, const Tensor& edges, const Tensor& min_val,
               const Tensor& max_val, const Tensor& scale, const Tensor& zero_point,
               const Tensor& error, int64_t quant_min, int64_t quant_max, double p,
               std::optional<int64_t> fixed_zero_point, int64_t constraint,
               std::optional<Tensor> eps, std::optional<Tensor> enabled) {
  const Histograms histograms(kOpSearch, counts, edges, min_val, max_val);
  check_state(kOpSearch, "scale", scale, counts, ScalarType::Float);
  check_numel(kOpSearch, "scale", scale, histograms.count());
  const ScalarType zero_dtype = check_zero_point(kOpSearch, zero_point, counts, histograms.count());
  check_state(kOpSearch, "error", error, counts, ScalarType::Double);
  check_numel(kOpSearch, "error", error, kErrors * histograms.count());
  check_quant_range(kOpSearch, quant_min, quant_max);
  check_p(kOpSearch, p);
  check(constraint >= 0 && constraint <= 3, kOpSearch,
        ": constraint: expected 0 (none), 1 (power_of_two), 2 (fp16) or 3 (e8m0), got ",
        constraint);
  if (eps.has_value()) {
    check_state(kOpSearch, "eps", *eps, counts, ScalarType::Float);
    check_numel(kOpSearch, "eps", *eps, 1);
  }
  LpGoal goal = {-1, quant_max - quant_min, p, static_cast<Constraint>(constraint),
                 eps.has_value() ? *const_data<float>(*eps) : 0.0f};
  if (fixed_zero_point.has_value()) {
    check(quant_min <= *fixed_zero_point && *fixed_zero_point <= quant_max, kOpSearch,
          ": fixed_zero_point: expected a value in [", quant_min, ", ", quant_max, "], got ",
          *fixed_zero_point);
    goal.below = *fixed_zero_point - quant_min;
    goal.above = quant_max - *fixed_zero_point;
  }
  if (is_off(kOpSearch, "enabled", enabled, counts)) {
    return;
  }
  float* scales = mutable_data<float>(scale);
  void* zero_points = zero_point.mutable_data_ptr();
  double* errors = mutable_data<double>(error);
  histograms.for_each([&](int64_t i, const LpHistogram& histogram, double total, double* room) {
    const LpChoice choice =
        total > 0.0 ? lp_search_table().search(histogram, goal, room) : LpChoice{1.0f, 0, {}};
    const int64_t zero = total > 0.0 ? quant_min + choice.below : 0;
    scales[i] = choice.scale;
    if (zero_dtype == ScalarType::Int) {
      static_cast<int32_t*>(zero_points)[i] = static_cast<int32_t>(zero);
    } else {
      static_cast<int64_t*>(zero_points)[i] = zero;
    }
    write_errors(choice.errors, total > 0.0 ? total : 1.0, errors + kErrors * i);
  });
}

Tensor lp_error(const Tensor& counts, const Tensor& edges, const Tensor& min_val,
                const Tensor& max_val, const Tensor& scale, const Tensor& zero_point,
                int64_t quant_min, int64_t quant_max, double p) {
  const Histograms histograms(kOpError, counts, edges, min_val, max_val);
  check_state(kOpError, "scale", scale, counts, ScalarType::Float);
  check_numel(kOpError, "scale", scale, histograms.count());
  const ScalarType zero_dtype = check_zero_point(kOpError, zero_point, counts, histograms.count());
  check_quant_range(kOpError, quant_min, quant_max);
  check_p(kOpError, p);
  std::vector<int64_t> sizes(counts.sizes().begin(), counts.sizes().end());
  sizes.back() = kErrors;
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size() - 1; d > 0; --d) {
    strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  }
  const Tensor error = empty_strided(counts, {sizes.data(), sizes.size()},
                                     {strides.data(), strides.size()}, aoti_torch_dtype_float64());
  const float* scales = const_data<float>(scale);
  const void* zero_points = zero_point.const_data_ptr();
  double* errors = mutable_data<double>(error);
  histograms.for_each([&](int64_t i, const LpHistogram& histogram, double total, double* room) {
    const int64_t zero = zero_dtype == ScalarType::Int
                             ? int64_t{static_cast<const int32_t*>(zero_points)[i]}
                             : static_cast<const int64_t*>(zero_points)[i];
    const bool on_grid = quant_min <= zero && zero <= quant_max;
    const bool usable = scales[i] > 0.0f && is_finite(scales[i]) && on_grid;
    LpErrors found = {__builtin_nan(""), __builtin_nan(""), __builtin_nan("")};
    if (!(total > 0.0)) {
      found = {};
    } else if (usable) {
      found = lp_search_table().errors(histogram, scales[i], zero - quant_min, quant_max - zero, p,
                                       room);
    }
    write_errors(found, total > 0.0 ? total : 1.0, errors + kErrors * i);
  });
  return error;
}

}  // namespace
}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CPU, m) {
  m.impl("lp_search", TORCH_BOX(&pyobserver::lp_search));
  m.impl("lp_error", TORCH_BOX(&pyobserver::lp_error));
}
