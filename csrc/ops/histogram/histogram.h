// histogram: linear bins over [low, high], and how counts are carried to a wider range.
//
// The bin of a value is that of torch.histc: (x - left) * bins / (right - left) in float32, cut
// to an integer, the last bin closed. Where that would leave float32 it is float64. A range of one
// value has the bins of [value - 1, value + 1].
#pragma once

#include "../../core/cpu_isa.h"
#include "../../core/dtype.h"

namespace pyobserver {

enum class Combine { midpoint, aligned };  // as the op numbers them

// Up to so many values the counts are computed in float32, for the very numbers of torch.ao.
constexpr double kFloat32Counts = 1 << 24;

struct BinGrid {
  float left, width;
  double wide_left, wide_width;
  int32_t bins;
  bool wide;     // the float32 product would overflow
  bool unsplit;  // a constant so large that adding one does not change it
};

PYOBS_HD BinGrid bin_grid(float low, float high, int32_t bins) {
  const float left = low == high ? low - 1.0f : low;
  const float right = low == high ? high + 1.0f : high;
  BinGrid grid;
  grid.left = left;
  grid.width = right - left;
  grid.wide_left = left;
  grid.wide_width = static_cast<double>(right) - static_cast<double>(left);
  grid.bins = bins;
  grid.wide = !is_finite(grid.width * static_cast<float>(bins));
  grid.unsplit = grid.width == 0.0f;
  return grid;
}

PYOBS_HD int32_t clamp_bin(int32_t index, int32_t bins) {
  index = index > bins - 1 ? bins - 1 : index;
  return index < 0 ? 0 : index;
}

// The bin of a finite value inside the range, where the grid is neither wide nor unsplit.
PYOBS_HD int32_t narrow_bin_index(float x, const BinGrid& grid) {
  const float position = (x - grid.left) * static_cast<float>(grid.bins) / grid.width;
  return clamp_bin(static_cast<int32_t>(position), grid.bins);
}

// The bin of a finite value inside the range.
PYOBS_HD int32_t bin_index(float x, const BinGrid& grid) {
  if (grid.unsplit) {
    return grid.bins / 2;
  }
  if (!grid.wide) {
    return narrow_bin_index(x, grid);
  }
  const double position = (static_cast<double>(x) - grid.wide_left) * grid.bins / grid.wide_width;
  return clamp_bin(static_cast<int32_t>(position), grid.bins);
}

// torch.linspace(low, high, steps) in float32, whose multiply-add is one rounding, hence float64
// here.
struct Linspace {
  double low, high, step;
  int64_t steps;
};

PYOBS_HD Linspace linspace(float low, float high, int64_t steps) {
  const float narrow = (high - low) / static_cast<float>(steps - 1);
  const double first = static_cast<double>(low), last = static_cast<double>(high);
  const double wide = (last - first) / static_cast<double>(steps - 1);
  return {first, last, is_finite(narrow) ? static_cast<double>(narrow) : wide, steps};
}

PYOBS_HD float element(const Linspace& space, int64_t index) {
  const double value = index < space.steps / 2
                           ? space.low + space.step * static_cast<double>(index)
                           : space.high - space.step * static_cast<double>(space.steps - 1 - index);
  return static_cast<float>(value);
}

// Each half rises; where steps have few bits, as in ranges of subnormal width, the second may begin
// below the end of the first.
PYOBS_HD bool is_in_order(const Linspace& space) {
  return element(space, space.steps / 2 - 1) <= element(space, space.steps / 2);
}

// The parts of old bins, `upsample_rate` of each, and the edges of the bins that they go to.
struct MidpointGrid {
  Linspace parts, edges;
  float half_part;
  int32_t bins;
  int64_t upsample_rate, fine;
  bool in_order;
};

PYOBS_HD MidpointGrid midpoint_grid(float low, float high, float new_low, float new_high,
                                    int32_t bins, int64_t upsample_rate) {
  const int64_t fine = bins * upsample_rate;
  const float narrow = (high - low) / static_cast<float>(fine);
  const double wide = static_cast<double>(high) / static_cast<double>(fine) -
                      static_cast<double>(low) / static_cast<double>(fine);
  MidpointGrid grid;
  grid.parts = linspace(low, high, fine + 1);
  grid.edges = linspace(new_low, new_high, bins + 1);
  grid.half_part = 0.5f * (is_finite(narrow) ? narrow : static_cast<float>(wide));
  grid.bins = bins;
  grid.upsample_rate = upsample_rate;
  grid.fine = fine;
  grid.in_order = is_in_order(grid.parts) && is_in_order(grid.edges);
  return grid;
}

PYOBS_HD float midpoint(const MidpointGrid& grid, int64_t part) {
  return element(grid.parts, part) + grid.half_part;
}

// From `least` on, the first part whose midpoint is not below the bin.
PYOBS_HD int64_t first_part(const MidpointGrid& grid, int32_t bin, int64_t least) {
  const float edge = element(grid.edges, bin);
  if (midpoint(grid, least) >= edge) {  // as where float32 has one value for many edges
    return least;
  }
  const double guess = (static_cast<double>(edge) - grid.parts.low) / grid.parts.step - 0.5;
  int64_t part = least;
  if (guess > static_cast<double>(least)) {
    part = guess < static_cast<double>(grid.fine) ? static_cast<int64_t>(guess) : grid.fine;
  }
  while (part > least && midpoint(grid, part - 1) >= edge) {
    --part;
  }
  while (part < grid.fine && midpoint(grid, part) < edge) {
    ++part;
  }
  return part;
}

// The first part of a bin, of which each begins where the one before has ended. In order that is
// the first part of all that is not below it, whatever the bins before have taken: edges and
// midpoints rise, so the first part of the bin before is no later.
PYOBS_HD int64_t first_part_of(const MidpointGrid& grid, int32_t bin) {
  if (bin == 0 || bin == grid.bins) {
    return bin == 0 ? 0 : grid.fine;
  }
  int64_t part = 0;
  for (int32_t i = grid.in_order ? bin : 1; i <= bin; ++i) {
    part = first_part(grid, i, part);
  }
  return part;
}

// Of the parts [part, end). Count is float or double: what the sums are rounded to, one part after
// the other as torch adds them.
template <class Count>
PYOBS_HD double sum_of_parts(const double* counts, int64_t upsample_rate, int64_t part,
                             int64_t end) {
  Count sum = 0;
  int64_t old_bin = part / upsample_rate;
  while (part < end) {
    const int64_t after = (old_bin + 1) * upsample_rate;
    const int64_t last = after < end ? after : end;
    const Count share = static_cast<Count>(counts[old_bin]) / static_cast<Count>(upsample_rate);
    for (; part < last; ++part) {
      sum += share;
    }
    ++old_bin;
  }
  return static_cast<double>(sum);
}

// The common grid of an old and a wider range: parts of an old bin, so many of which make a new
// bin, the old range so many parts in, and the new maximum relaxed to a whole number of them.
struct AlignedGrid {
  float high;
  double parts_per_bin, offset;
};

PYOBS_HD AlignedGrid aligned_grid(float low, float high, float new_low, float new_high,
                                  int32_t bins, int64_t upsample_rate) {
  const double part = (static_cast<double>(high) - static_cast<double>(low)) /
                      static_cast<double>(bins * upsample_rate);
  const double new_width = static_cast<double>(new_high) - static_cast<double>(new_low);
  AlignedGrid grid;
  grid.parts_per_bin = __builtin_ceil(new_width / (bins * part));
  const double relaxed = static_cast<double>(new_low) + grid.parts_per_bin * (bins * part);
  const float narrowed = static_cast<float>(relaxed < 0x1.fffffep127 ? relaxed : 0x1.fffffep127);
  grid.high = narrowed > new_high ? narrowed : new_high;
  grid.offset =
      __builtin_nearbyint((static_cast<double>(low) - static_cast<double>(new_low)) / part);
  return grid;
}

// Counts up to part `index * parts_per_bin - offset` of the old bins, in O(1): `before` holds the
// counts before each old bin.
PYOBS_HD double aligned_cumulative(const double* counts, const double* before, int32_t bins,
                                   int64_t upsample_rate, const AlignedGrid& grid, int32_t index) {
  const double parts = static_cast<double>(bins * upsample_rate);
  const double rate = static_cast<double>(upsample_rate);
  double part = index == bins ? parts : index * grid.parts_per_bin - grid.offset;
  part = part > 0.0 ? (part < parts ? part : parts) : 0.0;
  const double whole = __builtin_floor(part / rate);
  const int32_t bin = whole < bins - 1 ? static_cast<int32_t>(whole) : bins - 1;
  return before[bin] + counts[bin] * ((part - bin * rate) / rate);
}

struct HistogramTable {
  // Adds the bins of n values to counts[0..bins), and to counts[bins] how many are not finite.
  // Where spread is not 0, every other value is counted `spread` further. False as soon as a
  // finite value lies outside the range; the counts are then of no use.
  bool (*bin)(DType dtype, const void* x, int64_t n, const BinGrid& grid, float low, float high,
              int64_t spread, uint32_t* counts);
  // counts[i] = carried[i] + repeat * (the sum of column i of added[rows][stride]), each sum
  // rounded to float32 if narrow. carried: may be counts; null is zeros.
  void (*add)(double* counts, const double* carried, const uint32_t* added, int64_t rows,
              int64_t stride, int32_t bins, double repeat, bool narrow);
  double (*sum)(const double* counts, int32_t bins);
};

PYOBS_KERNEL_TABLE(HistogramTable, histogram_table)

}  // namespace pyobserver
