// What the glue of every op that ends in a fake-quantize shares, on the CPU and on CUDA.
#pragma once

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../../core/check.h"
#include "../../core/layout.h"
#include "fake_quantize.h"

namespace pyobserver {

constexpr const char* kFakeQuantize = "fake_quantize";
constexpr const char* kFakeQuantizeBackward = "fake_quantize_backward";

inline void check_grid_params(const char* op, const Tensor& x, const Tensor& scale,
                              const Tensor& zero_point, int64_t quant_min, int64_t quant_max,
                              const Grouping& grouping) {
  check_state(op, "scale", scale, x, ScalarType::Float);
  const ScalarType zero_dtype = dtype_of(zero_point);
  check(zero_dtype == ScalarType::Float || zero_dtype == ScalarType::Int ||
            zero_dtype == ScalarType::Long,
        op, ": zero_point: expected int32, int64 or float32, got ",
        torch::headeronly::toString(zero_dtype));
  check_state(op, "zero_point", zero_point, x, zero_dtype);
  check_quant_range(op, quant_min, quant_max);
  if (x.numel() > 0) {
    check_groups(op, "scale", scale, x, grouping);
    check_groups(op, "zero_point", zero_point, x, grouping);
  }
}

inline ZeroPointType zero_point_type(const Tensor& zero_point) {
  switch (dtype_of(zero_point)) {
    case ScalarType::Float:
      return ZeroPointType::float32;
    case ScalarType::Int:
      return ZeroPointType::int32;
    default:
      return ZeroPointType::int64;
  }
}

// For the CPU alone: elsewhere it would be a device sync.
inline void check_grid_values(const char* op, const float* scales, const void* zero_points,
                              ZeroPointType type, int64_t count, int64_t quant_min,
                              int64_t quant_max) {
  for (int64_t i = 0; i < count; ++i) {
    check(scales[i] > 0.0f && is_finite(scales[i]), op,
          ": scale: expected positive finite values, got ", scales[i]);
  }
  for (int64_t i = 0; i < count && type != ZeroPointType::float32; ++i) {
    const double zero_point = read_zero_point(zero_points, type, i);
    check(zero_point >= static_cast<double>(quant_min) &&
              zero_point <= static_cast<double>(quant_max),
          op, ": zero_point: expected values in [quant_min, quant_max] = [", quant_min, ", ",
          quant_max, "], got ", zero_point);
  }
}

// The same for a float zero point that is to be rounded to an integer of the grid.
inline void check_learned_values(const char* op, const float* scales, const float* zero_points,
                                 int64_t count) {
  check_grid_values(op, scales, zero_points, ZeroPointType::float32, count, 0, 0);
  for (int64_t i = 0; i < count; ++i) {
    check(zero_points[i] == zero_points[i], op, ": zero_point: expected numbers, got ",
          zero_points[i]);
  }
}

inline QuantGrid quant_grid(DType dtype, int64_t quant_min, int64_t quant_max, bool per_group,
                            bool float_zero_point) {
  constexpr int64_t kExact = 1 << 22;  // a difference of two such integers is exact in float32
  const bool narrow = quant_min >= -kExact && quant_max <= kExact;
  return {static_cast<double>(quant_min), static_cast<double>(quant_max), float_zero_point,
          per_group && (dtype == DType::float64 || float_zero_point || !narrow)};
}

inline int64_t mask_bytes(const Tensor& x) { return (x.numel() + 7) / 8; }

// One bit for each element of x.
inline Tensor empty_mask(const Tensor& x) {
  const int64_t bytes = mask_bytes(x);
  const int64_t stride = 1;
  return empty_strided(x, {&bytes, 1}, {&stride, 1}, aoti_torch_dtype_uint8());
}

// The bytes from the first to the last element.
inline std::pair<const char*, const char*> extent(const Tensor& x, int64_t element_bytes) {
  const auto* first = static_cast<const char*>(x.const_data_ptr());
  int64_t last = 0;
  for (int64_t d = 0; d < x.dim(); ++d) {
    last += (x.size(d) - 1) * x.stride(d);
  }
  return {first, first + (last + 1) * element_bytes};
}

// An output that the caller gives: x itself, or a tensor laid out as the op would make it.
inline void check_out(const char* op, const Tensor& x, const Tensor& out, bool dense) {
  const bool alike = dtype_of(out) == dtype_of(x) && on_one_device(out, x) &&
                     out.sizes() == x.sizes() &&
                     (dense ? out.strides() == x.strides() : out.is_contiguous());
  check(alike, op,
        ": out: expected x's shape, dtype and device, and its strides (contiguous where x is not "
        "dense)");
  if (x.numel() > 0) {
    const int64_t bytes = element_size(input_dtype(op, "x", x));
    const auto [from, from_end] = extent(x, bytes);
    const auto [to, to_end] = extent(out, bytes);
    check((dense && from == to) || from_end <= to || to_end <= from, op,
          ": out: expected x itself, or memory apart from it");
  }
}

// What a forward is asked for. mask may be null; so may out, and the result is then a new tensor.
struct FakeQuantizeArgs {
  const Tensor &x, &scale, &zero_point;
  int64_t quant_min, quant_max;
  const Grouping& grouping;
  const std::optional<Tensor>& enabled;
  const Tensor* out;
  uint8_t* mask;
  bool rounds_zero_point = false;  // a float one, to an integer of the grid
  float least_scale = 0.0f;        // with that: see usable_scale
};

// Each of the two libraries has its own.
Tensor fake_quantize_forward(const char* op, const FakeQuantizeArgs& args);

inline Tensor fake_quantize(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                            int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis,
                            std::optional<Tensor> enabled,
                            std::optional<std::vector<int64_t>> block_size) {
  const Grouping grouping = parse_grouping(kFakeQuantize, x, axis, block_size);
  return fake_quantize_forward(kFakeQuantize, {x, scale, zero_point, quant_min, quant_max, grouping,
                                               enabled, nullptr, nullptr});
}

inline void fake_quantize_out(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                              const Tensor& out, int64_t quant_min, int64_t quant_max,
                              std::optional<int64_t> axis, std::optional<Tensor> enabled,
                              std::optional<std::vector<int64_t>> block_size) {
  const Grouping grouping = parse_grouping(kFakeQuantize, x, axis, block_size);
  fake_quantize_forward(kFakeQuantize, {x, scale, zero_point, quant_min, quant_max, grouping,
                                        enabled, &out, nullptr});
}

inline std::tuple<Tensor, Tensor> fake_quantize_mask(
    const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
    int64_t quant_max, std::optional<int64_t> axis, std::optional<Tensor> enabled,
    std::optional<std::vector<int64_t>> block_size) {
  const Grouping grouping = parse_grouping(kFakeQuantize, x, axis, block_size);
  Tensor mask = empty_mask(x);
  Tensor y =
      fake_quantize_forward(kFakeQuantize, {x, scale, zero_point, quant_min, quant_max, grouping,
                                            enabled, nullptr, mutable_data<uint8_t>(mask)});
  return {y, mask};
}

inline void check_dense_gradient(const char* op, const Tensor& grad) {
  check(grad.numel() == 0 || Layout::of_output(grad, {}).dense, op,
        ": grad: expected a dense tensor, laid out as the forward's output");
}

inline void check_backward(const char* op, const Tensor& grad, const Tensor& mask) {
  check_state(op, "mask", mask, grad, ScalarType::Byte);
  check_numel(op, "mask", mask, mask_bytes(grad));
  check_dense_gradient(op, grad);
}

}  // namespace pyobserver
