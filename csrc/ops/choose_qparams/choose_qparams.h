// choose_qparams: scale and zero point of a range.
//
//   affine:       zero is put into the range; scale = max(width / steps, eps),
//                 zero_point = clamp(quant_min - round(min / scale), quant_min, quant_max)
//   symmetric:    scale = max(max(-min, max, 0) / (steps / 2), eps), a fixed zero point
//   affine_float: scale = width / steps, 1 where that is at most eps; zero_point = -min / scale
//
// steps = quant_max - quant_min. A range that was never fed (+inf, -inf) gives 1 and 0. A width
// that leaves float32 is divided before it is taken.
#pragma once

#include "../../core/dtype.h"

namespace pyobserver {

enum class Mapping { affine, symmetric, affine_float };

struct QParams {
  float scale;
  int64_t zero_point;
  float float_zero_point;  // of affine_float
};

PYOBS_HD float scale_of_width(float low, float high, float steps) {
  const float scale = (high - low) / steps;
  return scale == __builtin_huge_valf() ? high / steps - low / steps : scale;
}

PYOBS_HD QParams choose_qparams(float low, float high, float eps, int64_t quant_min,
                                int64_t quant_max, Mapping mapping, int64_t symmetric_zero_point) {
  if (low == __builtin_huge_valf() && high == -__builtin_huge_valf()) {
    return {1.0f, 0, 0.0f};
  }
  const float steps = static_cast<float>(static_cast<double>(quant_max - quant_min));
  if (mapping == Mapping::affine_float) {
    const float width = scale_of_width(low, high, steps);
    const float scale = width > eps ? width : 1.0f;
    return {scale, 0, -1.0f * low / scale};
  }
  // comparisons that let a NaN pass
  const float negative = low > 0.0f ? 0.0f : low;
  const float positive = high < 0.0f ? 0.0f : high;
  if (mapping == Mapping::symmetric) {
    const float bound = (-negative > positive || negative != negative) ? -negative : positive;
    const float half_steps = static_cast<float>(static_cast<double>(quant_max - quant_min) / 2);
    const float scale = bound / half_steps;
    return {scale < eps ? eps : scale, symmetric_zero_point, 0.0f};
  }
  const float width = scale_of_width(negative, positive, steps);
  const float scale = width < eps ? eps : width;
  const float shift = __builtin_nearbyintf(negative / scale);
  // a shift beyond the grid is cut by the clamp below
  const float reach = static_cast<float>(quant_max - quant_min);
  const float bounded = shift >= -reach ? shift : (shift == shift ? -reach : 0.0f);
  int64_t zero_point = quant_min - static_cast<int64_t>(bounded);
  zero_point = zero_point < quant_min ? quant_min : zero_point;
  zero_point = zero_point > quant_max ? quant_max : zero_point;
  return {scale, zero_point, 0.0f};
}

}  // namespace pyobserver
