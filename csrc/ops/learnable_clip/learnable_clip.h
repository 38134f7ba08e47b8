// learnable_clip: to two bounds that are learned, and to the grid of the farther one if that is
// asked for.
//
//   c = max(min(x, high), low), in x's type, to which the bounds are rounded
//   y = c, or fake_tensor_quant of c with amax = max(-low, high)
//
// NaN stays NaN. For the backward two bits an element are kept, each in a plane of its own in the
// order of the output's memory: whether x <= low, and whether x >= high. The gradient goes to the
// bounds whose bit is set, and where none is to x. The sums are those of lane_sums.h, in the order
// of the output's memory.
#pragma once

#include "../../core/lane_sums.h"
#include "../tensor_quant/tensor_quant.h"

namespace pyobserver {

struct ClipGrid {
  bool quantized;
  AmaxGrid grid;
};

PYOBS_HD float amax_of(float low, float high) { return -low > high ? -low : high; }

// The bounds as the arithmetic of T takes them, and the scale of their grid.
template <class Compute>
struct ClipBounds {
  Compute low, high;
  AmaxScale<Compute> scale;
};

template <class T>
PYOBS_HD auto clip_bounds(float low, float high, const ClipGrid& grid) {
  T low_of_type, high_of_type;
  store(static_cast<double>(low), &low_of_type);
  store(static_cast<double>(high), &high_of_type);
  using Compute = decltype(widen(T{}));
  const auto scale = read_amax<Compute>(amax_of(low, high), grid.grid.max_bound);
  return ClipBounds<Compute>{widen(low_of_type), widen(high_of_type), scale};
}

template <class Compute>
PYOBS_HD Compute clip(Compute x, const ClipBounds<Compute>& bounds) {
  const Compute value = x > bounds.high ? bounds.high : x;  // a NaN passes both
  return value < bounds.low ? bounds.low : value;
}

// What stands for a clipped value.
template <bool quantized, class Compute>
PYOBS_HD Compute clip_result(Compute clipped, const ClipBounds<Compute>& bounds,
                             const AmaxGrid& grid) {
  if (!quantized) {
    return clipped;
  }
  return to_amax_grid(clipped, bounds.scale.multiplier, grid) / bounds.scale.divisor;
}

struct ClipArgs {
  float low, high;
  ClipGrid grid;
};

// The two planes of bits; both null, or none.
struct ClipMask {
  uint8_t *below, *above;
};

struct ClipBackward {
  const void* grad;
  const uint8_t *below, *above;
  void* out;
  int64_t n, chunk;
  PairSums* sums;  // of each chunk: for the lower bound, and for the upper one
};

struct LearnableClipTable {
  // n elements, the first of which has bit `first`; of a byte of bits begun before, those are kept.
  // Returns whether a clipped value was negative.
  bool (*forward)(DType dtype, const void* x, void* y, const ClipMask& mask, int64_t first,
                  int64_t n, const ClipArgs& args);
  // Chunks [begin, end).
  void (*backward)(DType dtype, const ClipBackward& args, int64_t begin, int64_t end);
  PairSums (*finish)(const PairSums* sums, int64_t chunks);
};

PYOBS_KERNEL_TABLE(LearnableClipTable, learnable_clip_table)

}  // namespace pyobserver
