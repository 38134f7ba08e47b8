// choose_qparams: scale and zero point of a range.
//
//   affine:       zero is put into the range; scale = max(width / steps, eps),
//                 zero_point = clamp(quant_min - round(min / scale), quant_min, quant_max)
//   symmetric:    scale = max(max(-min, max, 0) / (steps / 2), eps), a fixed zero point
//   affine_float: scale = width / steps, 1 where that is at most eps; zero_point = -min / scale
//
//   fused_*:      what torch's fused moving-average kernel chooses, with a least scale of its own:
//                 a symmetric range of both signs over levels -(steps / 2 + 1) .. steps / 2, any
//                 other an affine one whose zero point is rounded from the end nearer to the grid
//
// steps = quant_max - quant_min. A range that was never fed (+inf, -inf) gives 1 and 0. A width
// that leaves float32 is divided before it is taken.
#pragma once

#include "../../core/dtype.h"
#include "../fake_quantize/fake_quantize.h"

namespace pyobserver {

// As the op numbers them.
enum class Mapping { affine, symmetric, affine_float, fused_affine, fused_symmetric };

struct QParams {
  float scale;
  int64_t zero_point;
  float float_zero_point;  // of affine_float
};

struct QParamsArgs {
  ZeroPointType zero_type;
  const float* eps;  // where the ranges are
  int64_t quant_min, quant_max;
  Mapping mapping;
  int64_t symmetric_zero_point;
};

PYOBS_HD float scale_of_width(float low, float high, float steps) {
  const float scale = (high - low) / steps;
  return scale == __builtin_huge_valf() ? high / steps - low / steps : scale;
}

PYOBS_HD QParams fused_qparams(float low, float high, int64_t quant_min, int64_t quant_max,
                               bool symmetric) {
  if (symmetric && low < 0.0f && high > 0.0f) {
    const int64_t least = -((quant_max - quant_min) / 2 + 1);
    const int64_t most = (quant_max - quant_min) / 2;
    const float from_low = __builtin_fabsf(low / static_cast<float>(least));
    const float from_high = __builtin_fabsf(high / static_cast<float>(most));
    const double bound = from_low > from_high ? from_low : from_high;
    low = static_cast<float>(bound * static_cast<double>(least));
    high = static_cast<float>(bound * static_cast<double>(most));
  }
  float negative = low > 0.0f ? 0.0f : low;
  float positive = high < 0.0f ? 0.0f : high;
  const double first = static_cast<double>(quant_min), last = static_cast<double>(quant_max);
  const double steps = static_cast<double>(quant_max - quant_min);
  float scale =
      static_cast<float>((static_cast<double>(positive) - static_cast<double>(negative)) / steps);
  if (scale == 0.0f || 1.0f / scale == __builtin_huge_valf()) {
    scale = 0.1f;
  }
  constexpr float kLeastScale = 6.1e-5f;
  if (scale < kLeastScale) {
    const float width = kLeastScale * static_cast<float>(steps);
    const float amplifier = kLeastScale / scale;
    const bool from_zero = negative == 0.0f, to_zero = positive == 0.0f;
    positive = from_zero ? width : (to_zero ? positive : positive * amplifier);
    negative = from_zero ? negative : (to_zero ? -width : negative * amplifier);
    scale = kLeastScale;
  }
  const double below = static_cast<double>(negative) / static_cast<double>(scale);
  const double above = static_cast<double>(positive) / static_cast<double>(scale);
  const bool low_nearer =
      __builtin_fabs(first) + __builtin_fabs(below) < __builtin_fabs(last) + __builtin_fabs(above);
  double zero_point = low_nearer ? first - below : last - above;
  // asked again: denormals became 0 above
  const bool middle = symmetric && negative < 0.0f && positive > 0.0f;
  zero_point = middle ? (first + last) / 2 : zero_point;
  zero_point = zero_point == zero_point ? __builtin_nearbyint(zero_point) : 0.0;
  zero_point = zero_point < first ? first : (zero_point > last ? last : zero_point);
  return {scale, static_cast<int64_t>(zero_point), 0.0f};
}

PYOBS_HD QParams choose_qparams(float low, float high, float eps, int64_t quant_min,
                                int64_t quant_max, Mapping mapping, int64_t symmetric_zero_point) {
  if (low == __builtin_huge_valf() && high == -__builtin_huge_valf()) {
    return {1.0f, 0, 0.0f};
  }
  if (mapping == Mapping::fused_affine || mapping == Mapping::fused_symmetric) {
    return fused_qparams(low, high, quant_min, quant_max, mapping == Mapping::fused_symmetric);
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

// Of range i, to element i of the scales and zero points.
PYOBS_HD void write_qparams(float low, float high, int64_t i, const QParamsArgs& args,
                            float* scales, void* zero_points) {
  const QParams qparams = choose_qparams(low, high, *args.eps, args.quant_min, args.quant_max,
                                         args.mapping, args.symmetric_zero_point);
  scales[i] = qparams.scale;
  switch (args.zero_type) {
    case ZeroPointType::float32:
      static_cast<float*>(zero_points)[i] = args.mapping == Mapping::affine_float
                                                ? qparams.float_zero_point
                                                : static_cast<float>(qparams.zero_point);
      break;
    case ZeroPointType::int32:
      static_cast<int32_t*>(zero_points)[i] = static_cast<int32_t>(qparams.zero_point);
      break;
    default:
      static_cast<int64_t*>(zero_points)[i] = qparams.zero_point;
  }
}

}  // namespace pyobserver
