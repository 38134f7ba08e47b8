// A Layout as the CUDA kernels see it: where the elements of the walk lie, and whose they are.
#pragma once

#include <optional>

#include "device.cuh"
#include "layout.h"

namespace pyobserver {

struct DeviceLayout {
  static constexpr int kMostAxes = 16;
  int64_t numel, repeat, groups, inner, channels, piece;
  bool dense;
  int over_count, walk_count;
  int64_t over_size[kMostAxes], over_group[kMostAxes];
  int64_t walk_size[kMostAxes], walk_stride[kMostAxes];
};

inline DeviceLayout device_layout(const char* op, const Layout& layout) {
  DeviceLayout found = {};
  found.numel = layout.numel;
  found.repeat = layout.repeat;
  found.groups = layout.groups;
  found.inner = layout.inner;
  found.channels = layout.channels;
  found.piece = layout.piece;
  found.dense = layout.dense;
  found.over_count = layout.over_count();
  found.walk_count = layout.dense ? 0 : layout.walk_count();
  check(found.over_count <= DeviceLayout::kMostAxes && found.walk_count <= DeviceLayout::kMostAxes,
        op, ": x: expected at most ", DeviceLayout::kMostAxes,
        " dimensions that do not lie in a row");
  for (int i = 0; i < found.over_count; ++i) {
    found.over_size[i] = layout.over()[i].size;
    found.over_group[i] = layout.over()[i].group;
  }
  for (int i = 0; i < found.walk_count; ++i) {
    found.walk_size[i] = layout.walk()[i].size;
    found.walk_stride[i] = layout.walk()[i].stride;
  }
  return found;
}

// Where element i of the walk lies, in elements from the first.
PYOBS_DEVICE int64_t place_of(const DeviceLayout& layout, int64_t i) {
  if (layout.dense) {
    return i;
  }
  int64_t place = 0;
  for (int axis = layout.walk_count - 1; axis >= 0; --axis) {
    place += i % layout.walk_size[axis] * layout.walk_stride[axis];
    i /= layout.walk_size[axis];
  }
  return place;
}

// Where the kept values of piece `index` begin.
PYOBS_DEVICE int64_t base_of(const DeviceLayout& layout, int64_t index) {
  int64_t base = 0;
  for (int axis = layout.over_count - 1; axis >= 0; --axis) {
    base += index % layout.over_size[axis] * layout.over_group[axis];
    index /= layout.over_size[axis];
  }
  return base;
}

// Whose element i of the walk is.
PYOBS_DEVICE int64_t group_of(const DeviceLayout& layout, int64_t i) {
  if (layout.groups == 1) {
    return 0;
  }
  return i % layout.piece / layout.inner % layout.channels + base_of(layout, i / layout.piece);
}

// Division of any element's number of a group by the length of its runs.
struct RunDivisor {
  Divisor divisor;
  int64_t inner;
  bool narrow;

  RunDivisor(int64_t run, int64_t elements)
      : divisor(elements < kNarrow ? run : 1), inner(run), narrow(elements < kNarrow) {}
  PYOBS_MEMBER int64_t divide(int64_t element) const {
    return narrow ? divisor.divide(static_cast<uint32_t>(element)) : element / inner;
  }

 private:
  static constexpr int64_t kNarrow = int64_t{1} << 31;
};

// A group has numel / groups elements, in runs of `inner`: where in the walk its first run begins.
PYOBS_DEVICE int64_t first_of_group(const DeviceLayout& layout, int64_t group) {
  int64_t piece = 0, pieces = 1;
  for (int axis = layout.over_count - 1; axis >= 0; --axis) {
    if (layout.over_group[axis] != 0) {
      piece += group / layout.over_group[axis] % layout.over_size[axis] * pieces;
    }
    pieces *= layout.over_size[axis];
  }
  return piece * layout.piece + group % layout.channels * layout.inner;
}

// How far from its first run another one begins.
PYOBS_DEVICE int64_t offset_of_run(const DeviceLayout& layout, int64_t run) {
  const int64_t period = layout.channels * layout.inner;
  if (layout.over_count == 0) {
    return run * period;
  }
  const int64_t runs = layout.piece / period;
  int64_t offset = run % runs * period;
  run /= runs;
  int64_t pieces = 1;
  for (int axis = layout.over_count - 1; axis >= 0; --axis) {
    if (layout.over_group[axis] == 0) {
      offset += run % layout.over_size[axis] * pieces * layout.piece;
      run /= layout.over_size[axis];
    }
    pieces *= layout.over_size[axis];
  }
  return offset;
}

// A layout, with what 32-bit arithmetic needs where that suffices.
struct DividedLayout : DeviceLayout {
  bool small;  // less than 2^31 elements
  Divisor by_inner, by_channels, by_runs;
  Divisor by_over[kMostAxes], by_walk[kMostAxes];
};

inline DividedLayout divided_layout(const char* op, const Layout& layout) {
  constexpr int64_t kSmall = int64_t{1} << 31;
  DividedLayout found = {};
  static_cast<DeviceLayout&>(found) = device_layout(op, layout);
  found.small = layout.numel < kSmall;
  if (found.small && layout.numel > 0) {
    found.by_inner = Divisor(found.inner);
    found.by_channels = Divisor(found.channels);
    found.by_runs = Divisor(found.piece / found.inner);
    for (int i = 0; i < found.over_count; ++i) {
      found.by_over[i] = Divisor(found.over_size[i]);
    }
    for (int i = 0; i < found.walk_count; ++i) {
      found.by_walk[i] = Divisor(found.walk_size[i]);
    }
  }
  return found;
}

PYOBS_DEVICE int64_t place_of(const DividedLayout& layout, int64_t i) {
  if (layout.dense || !layout.small) {
    return place_of(static_cast<const DeviceLayout&>(layout), i);
  }
  int64_t place = 0;
  auto index = static_cast<uint32_t>(i);
  for (int axis = layout.walk_count - 1; axis >= 0; --axis) {
    const Divisor& by = layout.by_walk[axis];
    const uint32_t next = by.divide(index);
    place += (index - next * by.divisor) * layout.walk_stride[axis];
    index = next;
  }
  return place;
}

// Whose run `index` of the inner elements is.
PYOBS_DEVICE int64_t group_of_run(const DividedLayout& layout, uint32_t index) {
  int64_t group = layout.by_channels.remainder(index);
  if (layout.over_count == 0) {
    return group;
  }
  index = layout.by_runs.divide(index);
  for (int axis = layout.over_count - 1; axis >= 0; --axis) {
    const Divisor& by = layout.by_over[axis];
    const uint32_t next = by.divide(index);
    group += (index - next * by.divisor) * layout.over_group[axis];
    index = next;
  }
  return group;
}

PYOBS_DEVICE int64_t group_of(const DividedLayout& layout, int64_t i) {
  if (layout.groups == 1 || !layout.small) {
    return group_of(static_cast<const DeviceLayout&>(layout), i);
  }
  return group_of_run(layout, layout.by_inner.divide(static_cast<uint32_t>(i)));
}

}  // namespace pyobserver
