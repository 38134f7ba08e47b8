// How the glue sees a tensor: its elements in the order of memory, without gap or overlap.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "check.h"
#include "torch_api.h"

namespace pyobserver {

constexpr int64_t kMaxDims = 64;  // more axes of two elements have no address

// Whether the elements fill their memory without gap or overlap, in any order of axes.
inline bool is_dense(const Tensor& x) {
  if (x.numel() == 0) {
    return false;
  }
  if (x.is_contiguous()) {
    return true;
  }
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  std::array<int64_t, kMaxDims> order{};
  int64_t count = 0;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (sizes[d] != 1) {
      order[count++] = d;
    }
  }
  std::sort(order.begin(), order.begin() + count,
            [&](int64_t a, int64_t b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (int64_t i = 0; i < count; ++i) {
    if (strides[order[i]] != expected) {
      return false;
    }
    expected *= sizes[order[i]];
  }
  return true;
}

// In memory order a channel repeats as (outer, channels, inner); one range is one channel.
struct DenseInput {
  Tensor tensor;  // x, or a contiguous copy of one that is not dense
  int64_t outer, channels, inner;

  DenseInput(const Tensor& x, int64_t axis)
      : tensor(is_dense(x) ? x : torch::stable::contiguous(x)),
        outer(1),
        channels(1),
        inner(x.numel()) {
    if (axis >= 0) {
      channels = x.size(axis);
      inner = channels == 1 ? x.numel() : tensor.stride(axis);
      outer = x.numel() / (channels * inner);
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
inline Tensor empty_output(const Tensor& x) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  if (is_dense(x)) {
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

// Work is cut into equal parts, whose number and borders do not depend on what the parts hold.
constexpr int64_t kGrain = 32768;  // elements below which a thread costs more than it saves

inline int64_t part_count(int64_t elements) {
  const int64_t most = torch::stable::get_num_threads();
  return std::max<int64_t>(1, std::min(most, elements / kGrain));
}

// Calls body(part, begin, end) for each part of [0, size), borders at multiples of `multiple`.
// body must not throw.
template <class Body>
inline void for_each_part(int64_t size, int64_t parts, int64_t multiple, const Body& body) {
  const int64_t units = (size + multiple - 1) / multiple;
  const int64_t length = (units + parts - 1) / parts * multiple;
  if (parts == 1) {
    body(int64_t{0}, int64_t{0}, size);
    return;
  }
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      const int64_t begin = std::min(size, part * length);
      body(part, begin, std::min(size, begin + length));
    }
  });
}

}  // namespace pyobserver
