// fake_quantize: to the integers of a grid and back.
//
//   q = clamp(round(x * (1 / scale)) + zero_point, quant_min, quant_max)
//   y = (q - zero_point) * scale
//
// Halves round to even. With a float zero point the sum is rounded, not the product. +inf gives
// quant_max, -inf and NaN quant_min. Whether a value was inside the grid is kept as one bit, in
// the order of the output's memory, for the backward: grad_x = grad_y * bit.
//
// Which roundings happen is torch's: with one scale the result is computed in float32, with a
// scale for each channel in float64. For float32 and shorter types on a grid whose integers
// float32 holds exactly the two are the same, and the first is used.
#pragma once

#include "../../core/cpu_isa.h"
#include "../../core/dtype.h"

namespace pyobserver {

struct QuantGrid {
  double quant_min, quant_max;
  bool float_zero_point;  // add the zero point before rounding
  bool wide;              // the result in float64
};

PYOBS_HD float round_even(float value) { return __builtin_nearbyintf(value); }
PYOBS_HD double round_even(double value) { return __builtin_nearbyint(value); }

// The type that x is scaled in: float32, or float64 for float64.
PYOBS_HD float widen(float value) { return value; }
PYOBS_HD float widen(Half value) { return to_float(value); }
PYOBS_HD float widen(BFloat16 value) { return to_float(value); }
PYOBS_HD double widen(double value) { return value; }

template <class Compute>
PYOBS_HD Compute to_grid(Compute x, float inverse_scale, float zero_point, bool float_zero_point) {
  const Compute scaled = x * static_cast<Compute>(inverse_scale);
  const Compute zero = static_cast<Compute>(zero_point);
  return float_zero_point ? round_even(scaled + zero) : round_even(scaled) + zero;
}

template <class Compute>
PYOBS_HD float from_grid(Compute q, float scale, float zero_point, const QuantGrid& grid,
                         bool* inside) {
  const Compute low = static_cast<Compute>(grid.quant_min);
  const Compute high = static_cast<Compute>(grid.quant_max);
  *inside = (q >= low) & (q <= high);
  q = q > low ? q : low;  // a NaN fails the comparison
  q = q < high ? q : high;
  return (static_cast<float>(q) - zero_point) * scale;
}

template <class Compute>
PYOBS_HD double from_grid_wide(Compute q, float scale, double zero_point, const QuantGrid& grid,
                               bool* inside) {
  double wide = static_cast<double>(q);
  *inside = (wide >= grid.quant_min) & (wide <= grid.quant_max);
  wide = wide > grid.quant_min ? wide : grid.quant_min;
  wide = wide < grid.quant_max ? wide : grid.quant_max;
  return (wide - zero_point) * static_cast<double>(scale);
}

PYOBS_HD void store(double value, double* out) { *out = value; }
template <class T>
PYOBS_HD void store(double value, T* out) {
  from_float(static_cast<float>(value), out);
}

enum class ZeroPointType { int32, int64, float32 };

template <class Value = double>
PYOBS_HD Value read_zero_point(const void* zero_point, ZeroPointType type, int64_t channel) {
  switch (type) {
    case ZeroPointType::float32:
      return static_cast<Value>(static_cast<const float*>(zero_point)[channel]);
    case ZeroPointType::int32:
      return static_cast<Value>(static_cast<const int32_t*>(zero_point)[channel]);
    default:
      return static_cast<Value>(static_cast<const int64_t*>(zero_point)[channel]);
  }
}

// The integer of the grid that a learned zero point stands for; a NaN is the least.
PYOBS_HD int32_t rounded_zero_point(float zero_point, const QuantGrid& grid) {
  double rounded = round_even(static_cast<double>(zero_point));
  rounded = rounded > grid.quant_min ? rounded : grid.quant_min;
  return static_cast<int32_t>(rounded < grid.quant_max ? rounded : grid.quant_max);
}

// The scale that a learned one stands for: at least `least` and finite; NaN where it or its zero
// point is. As it is where `least` is 0.
PYOBS_HD float usable_scale(float scale, float zero_point, float least) {
  constexpr float kMost = 3.402823466e38f;
  if (least == 0.0f) {
    return scale;
  }
  const float bounded = scale < least ? least : scale;  // a NaN passes
  const float finite = bounded > kMost ? kMost : bounded;
  return zero_point == zero_point ? finite : zero_point;
}

// Element i of a piece has the scale and zero point base + (i / inner) % channels.
struct ChannelParams {
  const float* scale;
  const void* zero_point;
  ZeroPointType type;
  int64_t base, channels, inner;
};

struct FakeQuantizeTable {
  // n elements, the first of which is `offset` of its piece. y may be x.
  // mask: may be null; bit `first` and those after it, of which a byte begun before is kept.
  void (*forward)(DType dtype, const void* x, void* y, uint8_t* mask, int64_t first, int64_t n,
                  int64_t offset, const ChannelParams& params, const QuantGrid& grid);
  // begin is a multiple of 8; out may be grad.
  void (*backward)(DType dtype, const void* grad, const uint8_t* mask, void* out, int64_t begin,
                   int64_t end);
};

PYOBS_KERNEL_TABLE(FakeQuantizeTable, fake_quantize_table)

}  // namespace pyobserver
