// What the glue of observe_fake_quantize shares between the CPU and CUDA.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "../choose_qparams/choose_qparams_glue.h"
#include "../fake_quantize/fake_quantize_glue.h"
#include "../minmax/minmax_glue.h"

namespace pyobserver {

constexpr const char* kObserveFakeQuantize = "observe_fake_quantize";

// What a forward is asked for, checked but for the values of the device.
struct ObserveArgs {
  DType dtype;
  const MinmaxArgs& minmax;
  const QParamsArgs& qparams;
  const std::optional<Tensor>& enabled;  // of the observer
  const FakeQuantizeArgs& fake_quantize;
};

// Each of the two libraries has its own.
Tensor observe_fake_quantize_forward(const ObserveArgs& args);

inline Tensor observe_and_quantize(const Tensor& x, const Tensor& min_val, const Tensor& max_val,
                                   const Tensor& nonfinite_count, const Tensor& scale,
                                   const Tensor& zero_point, const Tensor& eps, int64_t quant_min,
                                   int64_t quant_max, const std::optional<Tensor>& observer_enabled,
                                   const std::optional<Tensor>& fake_quant_enabled, int64_t mapping,
                                   const std::optional<int64_t>& axis, int64_t symmetric_zero_point,
                                   int64_t update, double averaging_constant, int64_t nonfinite,
                                   const std::optional<std::vector<int64_t>>& block_size,
                                   uint8_t* mask) {
  const char* op = kObserveFakeQuantize;
  const DType dtype = input_dtype(op, "x", x);
  const Grouping grouping = parse_grouping(op, x, axis, block_size);
  const MinmaxArgs minmax = parse_minmax(op, x, min_val, max_val, nonfinite_count, grouping, update,
                                         averaging_constant, nonfinite);
  const QParamsArgs qparams = parse_qparams(op, x, scale, zero_point, eps, quant_min, quant_max,
                                            mapping, symmetric_zero_point);
  check_grid_params(op, x, scale, zero_point, quant_min, quant_max, grouping);
  check_switch(op, "fake_quant_enabled", fake_quant_enabled, x);
  check_switch(op, "observer_enabled", observer_enabled, x);
  const FakeQuantizeArgs fake_quantize = {
      x, scale, zero_point, quant_min, quant_max, grouping, fake_quant_enabled, nullptr, mask};
  return observe_fake_quantize_forward({dtype, minmax, qparams, observer_enabled, fake_quantize});
}

inline Tensor observe_fake_quantize(const Tensor& x, const Tensor& min_val, const Tensor& max_val,
                                    const Tensor& nonfinite_count, const Tensor& scale,
                                    const Tensor& zero_point, const Tensor& eps, int64_t quant_min,
                                    int64_t quant_max, std::optional<Tensor> observer_enabled,
                                    std::optional<Tensor> fake_quant_enabled, int64_t mapping,
                                    std::optional<int64_t> axis, int64_t symmetric_zero_point,
                                    int64_t update, double averaging_constant, int64_t nonfinite,
                                    std::optional<std::vector<int64_t>> block_size) {
  return observe_and_quantize(x, min_val, max_val, nonfinite_count, scale, zero_point, eps,
                              quant_min, quant_max, observer_enabled, fake_quant_enabled, mapping,
                              axis, symmetric_zero_point, update, averaging_constant, nonfinite,
                              block_size, nullptr);
}

inline std::tuple<Tensor, Tensor> observe_fake_quantize_mask(
    const Tensor& x, const Tensor& min_val, const Tensor& max_val, const Tensor& nonfinite_count,
    const Tensor& scale, const Tensor& zero_point, const Tensor& eps, int64_t quant_min,
    int64_t quant_max, std::optional<Tensor> observer_enabled,
    std::optional<Tensor> fake_quant_enabled, int64_t mapping, std::optional<int64_t> axis,
    int64_t symmetric_zero_point, int64_t update, double averaging_constant, int64_t nonfinite,
    std::optional<std::vector<int64_t>> block_size) {
  Tensor mask = empty_mask(x);
  Tensor y = observe_and_quantize(x, min_val, max_val, nonfinite_count, scale, zero_point, eps,
                                  quant_min, quant_max, observer_enabled, fake_quant_enabled,
                                  mapping, axis, symmetric_zero_point, update, averaging_constant,
                                  nonfinite, block_size, mutable_data<uint8_t>(mask));
  return {y, mask};
}

}  // namespace pyobserver
