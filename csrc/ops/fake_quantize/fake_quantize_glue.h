// Checks and allocations that the CPU and the CUDA glue of fake_quantize share.
#pragma once

#include <optional>
#include <tuple>

#include "../../core/check.h"
#include "../../core/dense.h"
#include "fake_quantize.h"

namespace pyobserver {

constexpr const char* kFakeQuantize = "fake_quantize";
constexpr const char* kFakeQuantizeBackward = "fake_quantize_backward";

inline void check_grid_params(const char* op, const Tensor& x, const Tensor& scale,
                              const Tensor& zero_point, int64_t quant_min, int64_t quant_max,
                              int64_t axis) {
  check_state(op, "scale", scale, x, ScalarType::Float);
  const ScalarType zero_dtype = zero_point.scalar_type();
  check(zero_dtype == ScalarType::Float || zero_dtype == ScalarType::Int ||
            zero_dtype == ScalarType::Long,
        op, ": zero_point: expected int32, int64 or float32, got ",
        torch::headeronly::toString(zero_dtype));
  check_state(op, "zero_point", zero_point, x, zero_dtype);
  check_quant_range(op, quant_min, quant_max);
  if (axis >= 0) {
    check_channels(op, "scale", scale, x.size(axis));
    check_channels(op, "zero_point", zero_point, x.size(axis));
  } else {
    check_numel(op, "scale", scale, 1);
    check_numel(op, "zero_point", zero_point, 1);
  }
}

inline QuantGrid quant_grid(DType dtype, int64_t quant_min, int64_t quant_max, bool per_channel,
                            bool float_zero_point) {
  constexpr int64_t kExact = 1 << 22;  // a difference of two such integers is exact in float32
  const bool narrow = quant_min >= -kExact && quant_max <= kExact;
  return {static_cast<double>(quant_min), static_cast<double>(quant_max), float_zero_point,
          per_channel && (dtype == DType::float64 || float_zero_point || !narrow)};
}

// One bit for each element of x.
inline Tensor empty_mask(const Tensor& x) {
  const int64_t bytes = (x.numel() + 7) / 8;
  const int64_t stride = 1;
  return empty_strided(x, {&bytes, 1}, {&stride, 1}, aoti_torch_dtype_uint8());
}

// The forward, into mask too where that is not null. Each of the two libraries has its own.
Tensor fake_quantize_forward(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                             int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis,
                             const std::optional<Tensor>& enabled, uint8_t* mask);

inline Tensor fake_quantize(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                            int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis,
                            std::optional<Tensor> enabled) {
  return fake_quantize_forward(x, scale, zero_point, quant_min, quant_max, axis, enabled, nullptr);
}

inline std::tuple<Tensor, Tensor> fake_quantize_mask(const Tensor& x, const Tensor& scale,
                                                     const Tensor& zero_point, int64_t quant_min,
                                                     int64_t quant_max, std::optional<int64_t> axis,
                                                     std::optional<Tensor> enabled) {
  Tensor mask = empty_mask(x);
  Tensor y = fake_quantize_forward(x, scale, zero_point, quant_min, quant_max, axis, enabled,
                                   mask.mutable_data_ptr<uint8_t>());
  return {y, mask};
}

inline void check_backward(const char* op, const Tensor& grad, const Tensor& mask) {
  check_state(op, "mask", mask, grad, ScalarType::Byte);
  check_numel(op, "mask", mask, (grad.numel() + 7) / 8);
  check(grad.numel() == 0 || is_dense(grad), op,
        ": grad: expected a dense tensor, laid out as the forward's output");
}

}  // namespace pyobserver
