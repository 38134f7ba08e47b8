// How the glue sees a tensor: where its elements lie, and which kept value (a scale, a minimum)
// each belongs to.
#pragma once

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "check.h"
#include "torch_api.h"

namespace pyobserver {

// Which elements share a kept value: all, those of one index of an axis, or those of one block.
struct Grouping {
  int64_t axis = -1;
  const std::vector<int64_t>* block_size = nullptr;

  int64_t count(const Tensor& x) const {
    int64_t groups = axis >= 0 ? x.size(axis) : 1;
    for (int64_t d = 0; block_size != nullptr && d < x.dim(); ++d) {
      groups *= x.size(d) / (*block_size)[d];
    }
    return groups;
  }
};

// Checked arguments `axis` and `block_size` of an op. An empty x has no groups.
inline Grouping parse_grouping(const char* op, const Tensor& x, const std::optional<int64_t>& axis,
                               const std::optional<std::vector<int64_t>>& block_size) {
  Grouping grouping;
  if (axis.has_value() && x.numel() > 0) {
    check(-x.dim() <= *axis && *axis < x.dim(), op, ": axis: expected a value in [", -x.dim(), ", ",
          x.dim() - 1, "], got ", *axis);
    grouping.axis = *axis < 0 ? *axis + x.dim() : *axis;
  }
  if (block_size.has_value()) {
    check(!axis.has_value(), op, ": block_size: expected None beside axis");
    check(static_cast<int64_t>(block_size->size()) == x.dim(), op,
          ": block_size: expected one size for each of ", x.dim(), " dimensions, got ",
          block_size->size());
    for (int64_t d = 0; d < x.dim(); ++d) {
      const int64_t size = (*block_size)[d];
      check(size >= 1 && x.size(d) % size == 0, op,
            ": block_size: expected divisors of x's sizes, ", "got ", size, " for the size ",
            x.size(d), " of dimension ", d);
    }
    grouping.block_size = &*block_size;
  }
  return grouping;
}

// A tensor of one value for each group: (channels,) for an axis, the grid of blocks for blocks.
inline void check_groups(const char* op, const char* name, const Tensor& state, const Tensor& x,
                         const Grouping& grouping) {
  if (grouping.block_size != nullptr) {
    bool same = state.dim() == x.dim();
    for (int64_t d = 0; same && d < x.dim(); ++d) {
      same = state.size(d) == x.size(d) / (*grouping.block_size)[d];
    }
    check(same, op, ": ", name, ": expected the shape of x over block_size, got ", state.numel(),
          " values in ", state.dim(), " dimensions");
  } else if (grouping.axis >= 0) {
    check_channels(op, name, state, x.size(grouping.axis));
  } else {
    check_numel(op, name, state, 1);
  }
}

// An axis of the walk. strides: of the elements, and of the kept values (0: reduced over).
struct Axis {
  int64_t size, stride, group;
};

constexpr int kMaxAxes = 128;  // of more than one element: 64 of two have no address

class Layout {
 public:
  // Each element once for its value: in the order of memory, and an expanded axis only once.
  static Layout of_reduction(const Tensor& x, const Grouping& grouping) {
    return Layout(x, grouping, true);
  }
  // Each element once for its place: in the order of memory where x is dense, else of its axes.
  static Layout of_output(const Tensor& x, const Grouping& grouping) {
    return Layout(x, grouping, false);
  }

  int64_t numel;     // elements of the walk
  int64_t repeat;    // how often each counts
  bool dense;        // the walk is that of memory, from the first element on
  int64_t groups;    // kept values
  int64_t inner;     // element i of a piece belongs to the value
  int64_t channels;  //   base of the piece + (i / inner) % channels
  int64_t piece;     // elements of a piece

  // Elements so many of which hold a group whole, or 0: where [0, numel) may be cut between threads
  // that share no kept value.
  int64_t border;

  // The axes over the pieces, outer to inner; their strides mean nothing.
  const Axis* over() const { return over_; }
  int over_count() const { return over_count_; }
  // The axes that the walk goes along, outer to inner, where it is not that of memory.
  const Axis* walk() const { return walk_; }
  int walk_count() const { return walk_count_; }

  // Calls body(data, first, count, offset, base) for the elements [first, first + count) of the
  // walk, which cover [begin, end) in order: data points to the first of them, all in a row; it is
  // element `offset` of its piece, whose kept values begin at `base`.
  template <class Body>
  void for_each_span(const void* data, int64_t element_size, int64_t begin, int64_t end,
                     const Body& body) const {
    constexpr int64_t kPacked = 8192;  // bytes
    alignas(64) char packed[kPacked];
    const auto* bytes = static_cast<const char*>(data);
    while (begin < end) {
      const int64_t offset = begin % piece;
      int64_t count = std::min(end - begin, piece - offset);
      const char* from = bytes + begin * element_size;
      if (!dense) {
        count = std::min(count, kPacked / element_size);
        pack(bytes, element_size, begin, count, packed);
        from = packed;
      }
      body(static_cast<const void*>(from), begin, count, offset, base_of(begin / piece));
      begin += count;
    }
  }

 private:
  Axis walk_[kMaxAxes];  // merged by where the elements lie
  Axis over_[kMaxAxes];
  int walk_count_ = 0, over_count_ = 0;

  Layout(const Tensor& x, const Grouping& grouping, bool reduction)
      : numel(x.numel()), repeat(1), dense(true), groups(1), inner(x.numel()), channels(1) {
    piece = border = numel;
    const bool contiguous = x.is_contiguous();
    if (numel == 0 || (contiguous && grouping.axis < 0 && grouping.block_size == nullptr)) {
      return;
    }
    groups = grouping.count(x);
    Axis axes[kMaxAxes];
    int count = collect(x, grouping, axes);
    if (!contiguous) {
      Axis sorted[kMaxAxes];
      std::copy(axes, axes + count, sorted);
      std::stable_sort(sorted, sorted + count,
                       [](const Axis& a, const Axis& b) { return a.stride > b.stride; });
      int kept = count;
      while (reduction && kept > 0 && sorted[kept - 1].stride == 0 && sorted[kept - 1].group == 0) {
        repeat *= sorted[--kept].size;
      }
      merge_walk(sorted, kept);
      if (!dense && !reduction) {
        merge_walk(axes, count);
      } else {
        std::copy(sorted, sorted + kept, axes);
        count = kept;
      }
      numel /= repeat;
    }
    find_pieces(axes, count);
  }

  static int collect(const Tensor& x, const Grouping& grouping, Axis* axes) {
    const auto sizes = x.sizes();
    const auto strides = x.strides();
    int count = 0;
    int64_t group = 1;  // stride of the kept values, from the last axis on
    for (int64_t d = x.dim() - 1; d >= 0; --d) {
      int64_t block = sizes[d];
      if (grouping.block_size != nullptr) {
        block = (*grouping.block_size)[d];
      } else if (grouping.axis == d) {
        block = 1;
      }
      const int64_t blocks = block == 0 ? 0 : sizes[d] / block;
      check(count + 2 <= kMaxAxes, "x: expected at most ", kMaxAxes,
            " dimensions of more than one element");
      if (block != 1) {
        axes[count++] = {block, strides[d], 0};
      }
      if (blocks != 1) {
        axes[count++] = {blocks, strides[d] * block, group};
      }
      group *= blocks;
    }
    std::reverse(axes, axes + count);
    return count;
  }

  void merge_walk(const Axis* axes, int count) {
    walk_count_ = 0;
    for (int i = 0; i < count; ++i) {
      Axis* last = walk_count_ > 0 ? &walk_[walk_count_ - 1] : nullptr;
      if (last != nullptr && last->stride == axes[i].stride * axes[i].size) {
        last->size *= axes[i].size;
        last->stride = axes[i].stride;
      } else {
        walk_[walk_count_++] = axes[i];
      }
    }
    dense = walk_count_ == 0 || (walk_count_ == 1 && walk_[0].stride == 1);
  }

  void find_pieces(const Axis* axes, int count) {
    over_count_ = 0;
    for (int i = 0; i < count; ++i) {
      Axis* last = over_count_ > 0 ? &over_[over_count_ - 1] : nullptr;
      const bool reduced = axes[i].group == 0;
      if (last != nullptr &&
          (reduced ? last->group == 0 : last->group == axes[i].group * axes[i].size)) {
        last->size *= axes[i].size;
        last->group = axes[i].group;
      } else {
        over_[over_count_++] = axes[i];
      }
    }
    const auto take = [&](int64_t group) {
      const bool fits = over_count_ > 0 && over_[over_count_ - 1].group == group;
      return fits ? over_[--over_count_].size : int64_t{1};
    };
    inner = take(0);
    channels = take(1);
    const int64_t outer = take(0);
    piece = outer * channels * inner;
    const bool reduced =
        std::any_of(over_, over_ + over_count_, [](const Axis& axis) { return axis.group == 0; });
    border = reduced ? 0 : (outer == 1 ? inner : piece);
  }

  int64_t base_of(int64_t index) const {
    int64_t base = 0;
    for (int i = over_count_ - 1; i >= 0; --i) {
      base += index % over_[i].size * over_[i].group;
      index /= over_[i].size;
    }
    return base;
  }

  void pack(const char* data, int64_t element_size, int64_t first, int64_t count,
            void* packed) const {
    if (element_size == 8) {
      pack_as(reinterpret_cast<const uint64_t*>(data), first, count,
              static_cast<uint64_t*>(packed));
    } else if (element_size == 4) {
      pack_as(reinterpret_cast<const uint32_t*>(data), first, count,
              static_cast<uint32_t*>(packed));
    } else {
      pack_as(reinterpret_cast<const uint16_t*>(data), first, count,
              static_cast<uint16_t*>(packed));
    }
  }

  template <class Bits>
  void pack_as(const Bits* data, int64_t first, int64_t count, Bits* packed) const {
    const Axis row = walk_[walk_count_ - 1];
    while (count > 0) {
      int64_t index = first / row.size;
      const int64_t within = first % row.size;
      const Bits* from = data + within * row.stride;
      for (int i = walk_count_ - 2; i >= 0; --i) {
        from += index % walk_[i].size * walk_[i].stride;
        index /= walk_[i].size;
      }
      const int64_t taken = std::min(count, row.size - within);
      for (int64_t i = 0; i < taken; ++i) {
        packed[i] = from[i * row.stride];
      }
      packed += taken;
      first += taken;
      count -= taken;
    }
  }
};

inline Tensor empty_strided(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                            torch::headeronly::IntHeaderOnlyArrayRef strides, int32_t dtype) {
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               dtype, device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

// The output of an elementwise op: the strides of x where x is dense, else contiguous.
inline Tensor empty_output(const Tensor& x, bool dense) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  if (dense) {
    return empty_strided(x, x.sizes(), x.strides(), dtype);
  }
  std::vector<int64_t> strides(x.dim());
  int64_t step = 1;
  for (int64_t d = x.dim() - 1; d >= 0; --d) {
    strides[d] = step;
    step *= std::max<int64_t>(x.size(d), 1);
  }
  return empty_strided(x, x.sizes(), {strides.data(), strides.size()}, dtype);
}

}  // namespace pyobserver
