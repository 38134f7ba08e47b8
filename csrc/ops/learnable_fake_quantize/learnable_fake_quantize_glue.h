// What the glue of learnable_fake_quantize shares, on the CPU and on CUDA.
#pragma once

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
  constexpr int64_t kMostChunks = 65536;  // but for those that a group has at least
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
  walk.chunk = walk.short_runs ? 512 : 4096;
  while (walk.chunk < walk.members &&
         (walk.members + walk.chunk - 1) / walk.chunk * walk.groups > kMostChunks) {
    walk.chunk *= 2;
  }
  walk.chunks = (walk.members + walk.chunk - 1) / walk.chunk;
  return walk;
}

inline Tensor learnable(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                        int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis,
                        std::optional<std::vector<int64_t>> block_size) {
  const Grouping grouping = parse_grouping(kLearnable, x, axis, block_size);
  check_state(kLearnable, "zero_point", zero_point, x, ScalarType::Float);
  FakeQuantizeArgs args = {x,        scale,        zero_point, quant_min, quant_max,
                           grouping, std::nullopt, nullptr,    nullptr};
  args.rounds_zero_point = true;
  return fake_quantize_forward(kLearnable, args);
}

// The arguments of a backward, and its results.
struct LearnableArgs {
  const Tensor &grad, &x, &scale, &zero_point;
  int64_t quant_min, quant_max;
  double grad_factor;
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
  call.grad_scale = mutable_data<float>(std::get<1>(grads));
  call.grad_zero_point = mutable_data<float>(std::get<2>(grads));
  call.grid = quant_grid(dtype, args.quant_min, args.quant_max, false, false);
  call.walk = group_walk(kLearnableBackward, layout);
  call.dense = layout.dense;
  return call;
}

inline LearnableGrads learnable_backward_op(const Tensor& grad, const Tensor& x,
                                            const Tensor& scale, const Tensor& zero_point,
                                            int64_t quant_min, int64_t quant_max,
                                            double grad_factor, std::optional<int64_t> axis,
                                            std::optional<std::vector<int64_t>> block_size) {
  const char* op = kLearnableBackward;
  const DType dtype = input_dtype(op, "x", x);
  const Grouping grouping = parse_grouping(op, x, axis, block_size);
  check_state(op, "zero_point", zero_point, x, ScalarType::Float);
  check_grid_params(op, x, scale, zero_point, quant_min, quant_max, grouping);
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
    learnable_backward(dtype, {grad, x, scale, zero_point, quant_min, quant_max, grad_factor},
                       layout, grads);
  }
  return grads;
}

}  // namespace pyobserver
