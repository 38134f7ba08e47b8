// What the glue of learnable_fake_quantize shares, on the CPU and on CUDA.
#pragma once

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "../fake_quantize/fake_quantize_glue.h"
#include "learnable_fake_quantize.h"

namespace pyobserver {

constexpr const char* kLearnable = "learnable_fake_quantize";
constexpr const char* kLearnableBackward = "learnable_fake_quantize_backward";

inline void add_axis(const char* op, GroupAxis* axes, int* count, int64_t size, int64_t step,
                     int64_t group) {
  if (size > 1) {
    check(*count < GroupWalk::kMostAxes, op, ": x: expected at most ", GroupWalk::kMostAxes,
          " dimensions that do not lie in a row");
    axes[(*count)++] = {size, step, group};
  }
}

inline GroupWalk group_walk(const char* op, const Layout& layout) {
  constexpr int64_t kShortRun = 8;
  GroupWalk walk = {};
  walk.groups = layout.groups;
  walk.members = layout.numel / layout.groups;
  const int64_t row = layout.channels * layout.inner;
  add_axis(op, walk.own, &walk.own_count, layout.inner, 1, 0);
  add_axis(op, walk.own, &walk.own_count, layout.piece / row, row, 0);
  add_axis(op, walk.over, &walk.over_count, layout.channels, layout.inner, 1);
  int64_t step = layout.piece;
  for (int i = layout.over_count() - 1; i >= 0; --i) {
    const Axis& axis = layout.over()[i];
    if (axis.group == 0) {
      add_axis(op, walk.own, &walk.own_count, axis.size, step, 0);
    } else {
      add_axis(op, walk.over, &walk.over_count, axis.size, step, axis.group);
    }
    step *= axis.size;
  }
  walk.short_runs = layout.inner < kShortRun && walk.groups > 1;
  walk.chunk = walk.short_runs ? chunk_of_sums(walk.members, walk.groups, 512)
                               : chunk_of_sums(walk.members, walk.groups);
  walk.chunks = (walk.members + walk.chunk - 1) / walk.chunk;
  return walk;
}

inline void check_least_scale(const char* op, double least_scale) {
  const float least = static_cast<float>(least_scale);
  check(least_scale == 0.0 || (least > 0.0f && is_finite(least)), op,
        ": least_scale: expected 0 or a positive finite float32, got ", least_scale);
}

inline Tensor learnable(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                        int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis,
                        std::optional<std::vector<int64_t>> block_size,
                        std::optional<Tensor> enabled, double least_scale) {
  const Grouping grouping = parse_grouping(kLearnable, x, axis, block_size);
  check_state(kLearnable, "zero_point", zero_point, x, ScalarType::Float);
  check_least_scale(kLearnable, least_scale);
  FakeQuantizeArgs args = {x,        scale,   zero_point, quant_min, quant_max,
                           grouping, enabled, nullptr,    nullptr};
  args.rounds_zero_point = true;
  args.least_scale = static_cast<float>(least_scale);
  return fake_quantize_forward(kLearnable, args);
}

// The arguments of a backward, and its results.
struct LearnableArgs {
  const Tensor &grad, &x, &scale, &zero_point;
  int64_t quant_min, quant_max;
  double grad_factor, least_scale;
  const std::optional<Tensor>&enabled, &held;
};
using LearnableGrads = std::tuple<Tensor, Tensor, Tensor>;

// Each of the two libraries has its own. layout: of_output of x; x is not empty.
void learnable_backward(DType dtype, const LearnableArgs& args, const Layout& layout,
                        const LearnableGrads& grads);

// What both kernels are given, but for the memory of the sums.
inline LearnedBackward learned_args(DType dtype, const LearnableArgs& args, const Layout& layout,
                                    const LearnableGrads& grads) {
  LearnedBackward call = {};
  call.grad = args.grad.const_data_ptr();
  call.x = args.x.const_data_ptr();
  call.grad_x = std::get<0>(grads).mutable_data_ptr();
  call.scale = const_data<float>(args.scale);
  call.zero_point = const_data<float>(args.zero_point);
  call.grad_factor = static_cast<float>(args.grad_factor);
  call.least_scale = static_cast<float>(args.least_scale);
  call.grad_scale = mutable_data<float>(std::get<1>(grads));
  call.grad_zero_point = mutable_data<float>(std::get<2>(grads));
  call.grid = quant_grid(dtype, args.quant_min, args.quant_max, false, false);
  call.walk = group_walk(kLearnableBackward, layout);
  call.dense = layout.dense;
  return call;
}

// What the factor is divided by: nothing, or the square root of the number of elements of a scale,
// in all or in a sample.
enum class Normalization { none, elements, features };

inline double normalized(double grad_factor, Normalization normalization, const Tensor& x,
                         int64_t groups, const Grouping& grouping) {
  if (normalization == Normalization::none || x.numel() == 0) {
    return grad_factor;
  }
  int64_t count = x.numel() / groups;
  if (normalization == Normalization::features && x.dim() > 0) {
    if (grouping.block_size != nullptr) {
      count /= (*grouping.block_size)[0];
    } else if (grouping.axis != 0) {
      count /= x.size(0);
    }
  }
  return grad_factor / std::sqrt(static_cast<double>(count));
}

inline LearnableGrads learnable_backward_op(
    const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& zero_point,
    int64_t quant_min, int64_t quant_max, double grad_factor, std::optional<int64_t> axis,
    std::optional<std::vector<int64_t>> block_size, std::optional<Tensor> enabled,
    std::optional<Tensor> held, double least_scale, int64_t normalize) {
  const char* op = kLearnableBackward;
  const DType dtype = input_dtype(op, "x", x);
  const Grouping grouping = parse_grouping(op, x, axis, block_size);
  check_state(op, "zero_point", zero_point, x, ScalarType::Float);
  check_grid_params(op, x, scale, zero_point, quant_min, quant_max, grouping);
  check_switch(op, "enabled", enabled, x);
  check_switch(op, "held", held, x);
  check_least_scale(op, least_scale);
  check(normalize >= 0 && normalize <= 2, op,
        ": normalize: expected 0 (none), 1 (elements) or 2 (features), got ", normalize);
  const Layout layout = Layout::of_output(x, grouping);
  const bool dense = layout.dense && x.numel() > 0;
  check(dtype_of(grad) == dtype_of(x) && on_one_device(grad, x) && grad.sizes() == x.sizes() &&
            (x.numel() == 0 || (dense ? grad.strides() == x.strides() : grad.is_contiguous())),
        op,
        ": grad: expected x's shape, dtype and device, and its strides (contiguous where x is not "
        "dense)");
  const LearnableGrads grads = {empty_output(x, dense), empty_output(scale, true),
                                empty_output(zero_point, true)};
  if (x.numel() == 0) {
    torch::stable::zero_(const_cast<Tensor&>(std::get<1>(grads)));
    torch::stable::zero_(const_cast<Tensor&>(std::get<2>(grads)));
  } else {
    const double factor =
        normalized(grad_factor, static_cast<Normalization>(normalize), x, layout.groups, grouping);
    learnable_backward(
        dtype,
        {grad, x, scale, zero_point, quant_min, quant_max, factor, least_scale, enabled, held},
        layout, grads);
  }
  return grads;
}

}  // namespace pyobserver
