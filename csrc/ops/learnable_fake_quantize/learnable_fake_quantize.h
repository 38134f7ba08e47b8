// learnable_fake_quantize: fake_quantize whose scale and zero point get gradients.
//
// The forward is that of fake_quantize with the zero point rounded to an integer of the grid. With
// y = (clamp(q) - z) * s, where q = round(x / s) + z, an element adds to the gradients of s and z
//
//   inside the grid      g * (y - x) / s      and   0
//   below it, NaN too    g * (quant_min - z)  and   -g * s
//   above it             g * (quant_max - z)  and   -g * s
//
// times grad_factor, each product rounded to float32 as torch's (float64 for float64), and gives x
// the gradient g or a zero of its sign.
//
// The sums are those of lane_sums.h, of the elements of a group in the order of the walk; but a
// chunk of short runs is summed from first to last.
#pragma once

#include "../../core/lane_sums.h"
#include "../fake_quantize/fake_quantize.h"

namespace pyobserver {

// An axis of the walk that a group spans (group 0), or that leads from group to group.
struct GroupAxis {
  int64_t size, step, group;
};

// Which elements of the walk belong to a group, and how their sum is cut.
struct GroupWalk {
  static constexpr int kMostAxes = 24;
  int64_t groups, members;  // members of each
  int64_t chunk, chunks;    // members of a chunk, chunks of a group
  bool short_runs;
  int own_count, over_count;
  GroupAxis own[kMostAxes];   // inner to outer
  GroupAxis over[kMostAxes];  // inner to outer
};

PYOBS_HD int64_t first_of_group(const GroupWalk& walk, int64_t group) {
  int64_t first = 0;
  for (int i = 0; i < walk.over_count; ++i) {
    first += group / walk.over[i].group % walk.over[i].size * walk.over[i].step;
  }
  return first;
}

// Where member e lies from the first of its group.
PYOBS_HD int64_t place_of_member(const GroupWalk& walk, int64_t e) {
  int64_t place = 0;
  for (int i = 0; i < walk.own_count; ++i) {
    place += e % walk.own[i].size * walk.own[i].step;
    e /= walk.own[i].size;
  }
  return place;
}

// One quantizer, and what its gradients need of it.
struct LearnedParams {
  float scale, inverse_scale, zero_point, low_slope, high_slope;
};

PYOBS_HD LearnedParams learned_params(float learned_scale, float zero_point, const QuantGrid& grid,
                                      float least_scale) {
  const float scale = usable_scale(learned_scale, zero_point, least_scale);
  const float zero = static_cast<float>(rounded_zero_point(zero_point, grid));
  return {scale, 1.0f / scale, zero, static_cast<float>(grid.quant_min) - zero,
          static_cast<float>(grid.quant_max) - zero};
}

template <class Compute>
struct LearnedGrads {
  Compute x, scale, zero_point;
};

// Branch-free, so that it vectorizes.
template <class Compute>
PYOBS_HD LearnedGrads<Compute> learned_grads(Compute x, Compute grad, const LearnedParams& params,
                                             const QuantGrid& grid, float grad_factor) {
  bool inside;
  const Compute q = to_grid(x, params.inverse_scale, params.zero_point, false);
  const Compute y = from_grid(q, params.scale, params.zero_point, grid, &inside);
  const bool above = q > static_cast<Compute>(grid.quant_max);
  const Compute slope = above ? params.high_slope : params.low_slope;
  const Compute by_rounding = grad * (y - x) * params.inverse_scale;
  const Compute by_clipping = grad * slope;
  const Compute by_shift = grad * Compute(-1) * params.scale * grad_factor;
  return {grad * static_cast<Compute>(inside ? 1.0f : 0.0f),
          (inside ? by_rounding : by_clipping) * grad_factor, inside ? Compute(0) : by_shift};
}

struct LearnedBackward {
  const void *grad, *x;  // x from its first element; grad and grad_x lie in the order of the walk
  void* grad_x;
  const float *scale, *zero_point;
  float grad_factor, least_scale;
  float *grad_scale, *grad_zero_point;
  PairSums* sums;  // of scale and zero point, of the chunks of a group in a row; unused where a
                   // group has one
  QuantGrid grid;
  GroupWalk walk;
  // where x lies, where not as the walk does: axes outer to inner
  bool dense;
  int axes;
  const GroupAxis* places;
};

struct LearnableTable {
  // Chunks [begin, end): those of a group in a row, but of short runs the first of each group, then
  // the second of each.
  void (*backward)(DType dtype, const LearnedBackward& args, int64_t begin, int64_t end);
  // The sums of the groups [begin, end), from those of their chunks.
  void (*finish)(const LearnedBackward& args, int64_t begin, int64_t end);
};

PYOBS_KERNEL_TABLE(LearnableTable, learnable_table)

}  // namespace pyobserver
