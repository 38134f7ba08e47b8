// What the glue of lp_search and lp_error shares on the CPU and on CUDA.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "../../core/check.h"
#include "../../core/layout.h"
#include "lp_search.h"

namespace pyobserver {

constexpr const char* kLpSearch = "lp_search";
constexpr const char* kLpError = "lp_error";
constexpr int64_t kLpErrors = 3;  // clipping, rounding, signal

// The histograms of an op, one after the other.
struct LpHistograms {
  int64_t count;
  int32_t bins;
  bool shared_edges;
  const double *counts, *edges;
  const float *lows, *highs;
};

PYOBS_HD LpHistogram histogram_at(const LpHistograms& all, int64_t i) {
  const int64_t edges = all.shared_edges ? 0 : i * (int64_t{all.bins} + 1);
  return {all.counts + i * all.bins, all.edges + edges, all.bins, all.lows[i], all.highs[i]};
}

PYOBS_HD bool has_range(const LpHistogram& histogram) {
  return is_finite(static_cast<float>(histogram.low)) &&
         is_finite(static_cast<float>(histogram.high)) && histogram.low <= histogram.high;
}

inline LpHistograms parse_histograms(const char* op, const Tensor& counts, const Tensor& edges,
                                     const Tensor& min_val, const Tensor& max_val) {
  check_state(op, "counts", counts, counts, ScalarType::Double);
  check(counts.dim() >= 1 && counts.size(counts.dim() - 1) >= 1 &&
            counts.size(counts.dim() - 1) < (1 << 30),
        op, ": counts: expected shape (..., bins) with at least 1 bin, got ", counts.dim(),
        " dimensions and ", counts.numel(), " values");
  const auto bins = static_cast<int32_t>(counts.size(counts.dim() - 1));
  const int64_t count = counts.numel() / bins;
  check_state(op, "edges", edges, counts, ScalarType::Double);
  check(edges.numel() == bins + 1 || edges.numel() == count * (bins + 1), op, ": edges: expected ",
        bins + 1, " for all histograms or for each, got ", edges.numel());
  check_state(op, "min_val", min_val, counts, ScalarType::Float);
  check_state(op, "max_val", max_val, counts, ScalarType::Float);
  check_numel(op, "min_val", min_val, count);
  check_numel(op, "max_val", max_val, count);
  return {count,
          bins,
          edges.numel() == bins + 1,
          const_data<double>(counts),
          const_data<double>(edges),
          const_data<float>(min_val),
          const_data<float>(max_val)};
}

// Zero points of int32 or int64.
struct LpZeroPoints {
  void* data;
  bool narrow;
};

PYOBS_HD int64_t zero_point_at(const LpZeroPoints& zero_points, int64_t i) {
  return zero_points.narrow ? int64_t{static_cast<const int32_t*>(zero_points.data)[i]}
                            : static_cast<const int64_t*>(zero_points.data)[i];
}

// Of both ops: data, the grid and the exponent.
inline LpZeroPoints parse_grid(const char* op, const Tensor& counts, int64_t histograms,
                               const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
                               int64_t quant_max, double p) {
  check_state(op, "scale", scale, counts, ScalarType::Float);
  check_numel(op, "scale", scale, histograms);
  const ScalarType dtype = dtype_of(zero_point);
  check(dtype == ScalarType::Int || dtype == ScalarType::Long, op,
        ": zero_point: expected int32 or int64, got ", torch::headeronly::toString(dtype));
  check_state(op, "zero_point", zero_point, counts, dtype);
  check_numel(op, "zero_point", zero_point, histograms);
  check_quant_range(op, quant_min, quant_max);
  check(p > 0.0 && p <= 6.0, op, ": p: expected a value in (0, 6], got ", p);
  return {const_cast<void*>(zero_point.const_data_ptr()), dtype == ScalarType::Int};
}

struct LpSearchArgs {
  LpHistograms histograms;
  LpGoal goal;       // all but the least scale
  const float* eps;  // which is here; null: 0
  int64_t quant_min;
  float* scales;
  LpZeroPoints zero_points;
  double* errors;
};

inline LpSearchArgs parse_lp_search(const Tensor& counts, const Tensor& edges,
                                    const Tensor& min_val, const Tensor& max_val,
                                    const Tensor& scale, const Tensor& zero_point,
                                    const Tensor& error, int64_t quant_min, int64_t quant_max,
                                    double p, const std::optional<int64_t>& fixed_zero_point,
                                    int64_t constraint, const std::optional<Tensor>& eps) {
  const char* op = kLpSearch;
  const LpHistograms histograms = parse_histograms(op, counts, edges, min_val, max_val);
  const LpZeroPoints zero_points =
      parse_grid(op, counts, histograms.count, scale, zero_point, quant_min, quant_max, p);
  check_state(op, "error", error, counts, ScalarType::Double);
  check_numel(op, "error", error, kLpErrors * histograms.count);
  check(constraint >= 0 && constraint <= 3, op,
        ": constraint: expected 0 (none), 1 (power_of_two), 2 (fp16) or 3 (e8m0), got ",
        constraint);
  if (eps.has_value()) {
    check_state(op, "eps", *eps, counts, ScalarType::Float);
    check_numel(op, "eps", *eps, 1);
  }
  LpGoal goal = {-1, quant_max - quant_min, p, static_cast<Constraint>(constraint), 0.0f};
  if (fixed_zero_point.has_value()) {
    check(quant_min <= *fixed_zero_point && *fixed_zero_point <= quant_max, op,
          ": fixed_zero_point: expected a value in [", quant_min, ", ", quant_max, "], got ",
          *fixed_zero_point);
    goal.below = *fixed_zero_point - quant_min;
    goal.above = quant_max - *fixed_zero_point;
  }
  return {histograms,
          goal,
          eps.has_value() ? const_data<float>(*eps) : nullptr,
          quant_min,
          mutable_data<float>(scale),
          zero_points,
          mutable_data<double>(error)};
}

// Reads the least scale, where it lies.
PYOBS_HD LpGoal goal_of(const LpSearchArgs& args) {
  LpGoal goal = args.goal;
  goal.least = args.eps == nullptr ? 0.0f : *args.eps;
  return goal;
}

// Means over the values.
PYOBS_HD void write_errors(const LpErrors& errors, double total, double* out) {
  const double values = total > 0.0 ? total : 1.0;
  out[0] = errors.clipping / values;
  out[1] = errors.rounding / values;
  out[2] = errors.signal / values;
}

// Of no values where the total is not positive.
PYOBS_HD void write_choice(const LpSearchArgs& args, int64_t i, const LpChoice& choice,
                           double total) {
  const bool found = total > 0.0;
  const int64_t zero = found ? args.quant_min + choice.below : 0;
  args.scales[i] = found ? choice.scale : 1.0f;
  if (args.zero_points.narrow) {
    static_cast<int32_t*>(args.zero_points.data)[i] = static_cast<int32_t>(zero);
  } else {
    static_cast<int64_t*>(args.zero_points.data)[i] = zero;
  }
  write_errors(found ? choice.errors : LpErrors{}, total, args.errors + kLpErrors * i);
}

struct LpErrorArgs {
  LpHistograms histograms;
  const float* scales;
  LpZeroPoints zero_points;
  int64_t quant_min, quant_max;
};

inline LpErrorArgs parse_lp_error(const Tensor& counts, const Tensor& edges, const Tensor& min_val,
                                  const Tensor& max_val, const Tensor& scale,
                                  const Tensor& zero_point, int64_t quant_min, int64_t quant_max,
                                  double p) {
  const LpHistograms histograms = parse_histograms(kLpError, counts, edges, min_val, max_val);
  const LpZeroPoints zero_points =
      parse_grid(kLpError, counts, histograms.count, scale, zero_point, quant_min, quant_max, p);
  return {histograms, const_data<float>(scale), zero_points, quant_min, quant_max};
}

// The scale and the levels of a histogram's question.
struct LpAsked {
  bool usable;
  double scale;
  int64_t below, above;
};

PYOBS_HD LpAsked asked_of(const LpErrorArgs& args, int64_t i) {
  const float scale = args.scales[i];
  const int64_t zero = zero_point_at(args.zero_points, i);
  const bool on_grid = args.quant_min <= zero && zero <= args.quant_max;
  return {scale > 0.0f && is_finite(scale) && on_grid, scale, zero - args.quant_min,
          args.quant_max - zero};
}

// What lp_error writes: of no values nothing, of an unusable scale NaN.
PYOBS_HD LpErrors no_errors(double total) {
  const double value = total > 0.0 ? __builtin_nan("") : 0.0;
  return {value, value, value};
}

inline Tensor empty_errors(const Tensor& counts) {
  std::vector<int64_t> sizes(counts.sizes().begin(), counts.sizes().end());
  sizes.back() = kLpErrors;
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size() - 1; d > 0; --d) {
    strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  }
  return empty_strided(counts, {sizes.data(), sizes.size()}, {strides.data(), strides.size()},
                       aoti_torch_dtype_float64());
}

}  // namespace pyobserver
