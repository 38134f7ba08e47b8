// tensor_quant: to the integers of a symmetric grid, given by the greatest magnitude amax.
// fake_tensor_quant: to them and back.
//
//   scale = max_bound / amax
//   q = clamp(round(x * scale), min_bound, max_bound)
//   y = q / scale
//
// Halves round to even; both divisions are true ones. An amax of 2^-24 or less counts as 0: x is
// multiplied by 0, and the scale is 1; so does every amax on a grid of 0 alone. A negative amax
// gives NaN, where nobody refuses it before. NaN stays NaN. For the backward one bit an element is
// kept, whether |x| <= amax, in the order of the output's memory: grad_x = bit ? grad_y : 0.
//
// The scale is computed in float32, or float64 for an amax of float64; all else in float32, or
// float64 for an x of float64.
#pragma once

#include "../../core/cpu_isa.h"
#include "../../core/dtype.h"
#include "../fake_quantize/fake_quantize.h"

namespace pyobserver {

constexpr int64_t kMostBits = 32;

struct AmaxGrid {
  float min_bound, max_bound;
};

static inline AmaxGrid amax_grid(int64_t num_bits, bool is_unsigned, bool narrow_range) {
  const int64_t positive_bits = num_bits - 1 + (is_unsigned ? 1 : 0);
  const int64_t most = positive_bits > 0 ? (int64_t{1} << positive_bits) - 1 : 0;
  const auto max_bound = static_cast<float>(most);
  if (is_unsigned) {
    return {0.0f, max_bound};
  }
  return {narrow_range ? -max_bound : -max_bound - 1.0f, max_bound};
}

// What x is multiplied with, and what the integers are divided by.
template <class Compute>
struct AmaxScale {
  Compute amax, multiplier, divisor;
};

template <class Amax>
PYOBS_HD AmaxScale<Amax> amax_scale(Amax amax, float max_bound) {
  const bool zero = amax <= static_cast<Amax>(0x1p-24) || max_bound == 0.0f;
  const Amax scale = static_cast<Amax>(max_bound) / amax;
  const Amax multiplier = zero ? Amax{0} : scale;
  const Amax divisor = zero ? Amax{1} : scale;
  const Amax nan = static_cast<Amax>(__builtin_nanf(""));
  return {amax, amax < 0 ? nan : multiplier, amax < 0 ? nan : divisor};
}

// An amax of any type as the result's arithmetic takes it.
template <class Compute, class T>
PYOBS_HD AmaxScale<Compute> read_amax(T amax, float max_bound) {
  const auto scale = amax_scale(widen(amax), max_bound);
  return {static_cast<Compute>(scale.amax), static_cast<Compute>(scale.multiplier),
          static_cast<Compute>(scale.divisor)};
}

template <class Compute>
PYOBS_HD Compute to_amax_grid(Compute x, Compute multiplier, const AmaxGrid& grid) {
  const Compute low = static_cast<Compute>(grid.min_bound);
  const Compute high = static_cast<Compute>(grid.max_bound);
  Compute q = round_even(x * multiplier);
  q = q < low ? low : q;  // a NaN passes both
  return q > high ? high : q;
}

template <class Compute>
PYOBS_HD bool is_within(Compute x, Compute amax) {
  return (x < 0 ? -x : x) <= amax;
}

// Element i of a piece has the amax base + (i / inner) % channels.
struct AmaxParams {
  const void* amax;
  DType type;
  int64_t base, channels, inner;
};

struct TensorQuantTable {
  // n elements, the first of which is `offset` of its piece; fake: back from the integers.
  // mask: may be null; bit `first` and those after it, of which a byte begun before is kept.
  // Returns whether there was a negative value, for an unsigned grid.
  bool (*forward)(DType dtype, const void* x, void* y, uint8_t* mask, int64_t first, int64_t n,
                  int64_t offset, const AmaxParams& params, const AmaxGrid& grid, bool fake);
  // begin is a multiple of 8; out may be grad.
  void (*backward)(DType dtype, const void* grad, const uint8_t* mask, void* out, int64_t begin,
                   int64_t end);
};

PYOBS_KERNEL_TABLE(TensorQuantTable, tensor_quant_table)

}  // namespace pyobserver
